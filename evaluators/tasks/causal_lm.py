"""Causal language modelling; in rows with a prompt, only the completion has a loss.

Notation: N examples, T tokens (padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from autopeft.evaluators.errors import DataError, ModelError
from autopeft.evaluators.gguf import EMBEDDED_LLM
from autopeft.evaluators.rows import EMBEDDED_FUNCTIONS, EMBEDDED_IN, DataConfig, Row, field_names, text_of
from autopeft.evaluators.tasks.base import IGNORED, Batch, Cut, Example, Prompted, Scored
from autopeft.evaluators.tasks.chat import messages_of, prompt_and_answer, tools_of, unread_parts
from autopeft.evaluators.tasks.text import TextTask

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autopeft.search_space.backbones.backbone import Backbone


#: Columns of other tools' formats that hold a part of what a row says.
_SYSTEM = ("system", "system_prompt")
_MEDIA = dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "causal-lm reads texts only")
#: Usual columns of a prompt and its completion.
_PAIRS = (("instruction", "output"), ("instruction", "response"), ("question", "answer"), ("query", "response"),
          ("input", "output"))  # fmt: skip


def _other_format(row: Row) -> str:
    """Return what to do about the row of another tool's format, as the end of an error; "" for an unknown one."""
    if "conversations" in row:
        return (
            ": rename 'conversations' to 'messages', their 'from' to 'role' (human: user, gpt: assistant) and their"
            " 'value' to 'content'"
        )
    for prompt, completion in _PAIRS:
        if prompt in row and completion in row:
            return f": set data.prompt: {prompt} and data.completion: {completion}"
    return ""


class CausalLM(TextTask):
    """Next-token prediction; scores of an example are means over its predicted tokens: cross-entropy and accuracy."""

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"
    trainer = "SFTTrainer"
    targets_per_token = ("labels",)

    @override
    @classmethod
    def problems(cls, data: DataConfig, model_id: str) -> Iterator[tuple[tuple[str, ...], str]]:
        if data.source in EMBEDDED_IN and data.source != EMBEDDED_FUNCTIONS:
            what = f"set data.source to {EMBEDDED_FUNCTIONS} or to your own data"
            yield ("data", "source"), f"the embedded data is for classification: {what}"
        if model_id == "embedded":
            what = f"set model.id to {EMBEDDED_LLM} or to another causal language model"
            yield ("model", "id"), f"the embedded model is an encoder: {what}"
        for name in ("text_pair", "labels"):
            if getattr(data, name) is not None:
                yield ("data", name), "can be set only for classification"

    @override
    @classmethod
    def row(cls, row: Row, data: DataConfig) -> Row:
        """Return a row in TRL's formats: prompt and completion (loss on the completion), messages, or text.

        Rows with messages may have tools, as JSON schemas.
        """
        if "messages" in row:
            tools = {"tools": tools_of(row["tools"])} if row.get("tools") else {}
            return {"messages": messages_of(row["messages"]), **tools}
        if data.prompt in row or data.completion in row:
            return {"prompt": text_of(row, data.prompt), "completion": text_of(row, data.completion)}
        if data.text in row:
            return {"text": text_of(row, data.text)}
        raise ValueError(
            f"a row needs the fields {data.prompt!r} and {data.completion!r}, or 'messages', or {data.text!r}; this"
            f" row has {field_names(row)}{_other_format(row)}"
        )

    @override
    @classmethod
    def unread(cls, row: Row, data: DataConfig) -> Mapping[str, str]:
        if "messages" in row:
            known = {**_MEDIA, **dict.fromkeys(_SYSTEM, "make it the first message, with the role 'system'")}
        elif data.prompt in row:
            known = {**_MEDIA, **dict.fromkeys((*_SYSTEM, "history", "tools"), "make rows with 'messages'")}
            if data.prompt == "instruction":  # the columns of Alpaca and of Dolly
                known |= dict.fromkeys(("input", "context"), "write it into 'instruction', as the model will see it")
        else:
            known = _MEDIA
        read = (data.prompt, data.completion, data.text, data.domain_field)
        return {name: advice for name, advice in known.items() if row.get(name) and name not in read}

    @override
    @classmethod
    def input_of(cls, row: Row) -> Any:
        return row.get("text") or row.get("prompt") or row["messages"][:-1]

    @override
    @classmethod
    def check_model(cls, model: nn.Module, backbone: Backbone) -> None:
        for site in backbone.sites:
            module = site.attention_module
            if module and getattr(model.get_submodule(module), "is_causal", True) is False:
                raise ModelError(
                    f"{backbone.id}: this model is an encoder, whose tokens attend to later ones; {cls.name} needs a"
                    " decoder"
                )

    @override
    def encode(self, rows: Sequence[Row]) -> list[Example]:
        # The tokenizer is much faster with many texts at once.
        chats = iter(self._chats([row for row in rows if "messages" in row]))
        others = iter(self._plain([row for row in rows if "messages" not in row]))
        return [self._example(row, *next(chats if "messages" in row else others)) for row in rows]

    def _example(self, row: Row, prompt: list[int], completion: list[int], unread: Mapping[str, str]) -> dict[str, Any]:
        if len(prompt[:1]) + len(completion) < 2 or not completion:  # no token precedes the first one
            raise DataError(["no token is left to predict: the row is too short"])
        # A long prompt is cut at its beginning, because the completion has the loss.
        num_prompt = min(len(prompt), max(self.max_length - len(completion), 0))
        labels = [*[IGNORED] * num_prompt, *completion][: self.max_length]
        if len(labels) < 2:
            raise DataError([f"data.max_length: {self.max_length} is too short: no token is left to predict"])
        example = {
            "input_ids": [*prompt[len(prompt) - num_prompt :], *completion][: self.max_length],
            "labels": labels,
            **self.domain(row),
        }
        if len(prompt) + len(completion) > self.max_length:
            example["cut"] = Cut(
                prompt=len(prompt) - num_prompt,
                text=max(len(completion) - self.max_length, 0),
                no_prompt=bool(prompt) and not num_prompt,
            )
        return {**example, "unread": unread} if unread else example

    def _plain(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], list[int], Mapping[str, str]]]:
        """Yield the tokens of prompt and completion, or none and the tokens of the text; the end of text is learnt."""
        eos = self.tokenizer.eos_token_id
        end = [] if eos is None else [eos]
        prompts = iter(self._open([row["prompt"] for row in rows if "prompt" in row]))
        texts = self._open([row["text"] if "text" in row else row["prompt"] + row["completion"] for row in rows])
        for row, ids in zip(rows, texts, strict=True):
            prompt = next(prompts) if "prompt" in row else []
            completion = ids[len(prompt) :]
            if ids[: len(prompt)] != prompt:
                # A token would span the boundary, but a generation that continues the prompt cannot produce it.
                (completion,) = self._ids([row["completion"]], add_special_tokens=False)
            yield prompt, [*completion, *end], {}

    def _open(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts that may continue: with special tokens at the beginning, none at the end."""
        eos = self.tokenizer.eos_token_id
        return [ids[:-1] if ids and ids[-1] == eos else ids for ids in self._ids(texts)]

    def _ids(self, texts: Sequence[str], **settings: Any) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(texts), verbose=False, **settings)["input_ids"] if texts else []
        return found

    def _chats(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], list[int], Mapping[str, str]]]:
        """Yield the tokens before the last message, those of the last message, and parts that are not read.

        The template supplies all special tokens, also at the end.
        """
        texts, unread = [], []
        for row in rows:
            messages, tools = row["messages"], row.get("tools")
            prompt, answer = prompt_and_answer(self.tokenizer, messages, tools)
            texts += [prompt, answer]
            unread.append(unread_parts(self.tokenizer, messages, tools, answer))
        ids = self._ids(texts, add_special_tokens=False)
        return zip(ids[::2], ids[1::2], unread, strict=True)

    @override
    def prompted(self, example: Example) -> Prompted | None:
        """Return all before the last tokens with a loss, and these."""
        labels = example["labels"]
        end = max(i for i, label in enumerate(labels) if label != IGNORED) + 1
        start = next((i + 1 for i in range(end - 1, -1, -1) if labels[i] == IGNORED), 0)
        ids = example["input_ids"]
        found = Prompted(prompt=ids[:start], reference=ids[start:end], domain=example.get("domain", 0))
        return found if start else None

    @override
    def targets(self, examples: Sequence[Example], width: int) -> Tensor:
        import torch

        targets = torch.full((len(examples), width), IGNORED)
        for row, example in enumerate(examples):
            targets[row, : len(example["labels"])] = torch.as_tensor(example["labels"])
        return targets

    @override
    def score(self, logits: Tensor, targets: Tensor) -> Scored:
        """Return the columns [N] from logits [N, T, V] and targets [N, T]."""
        from autopeft.evaluators.tasks.output_layer import from_logits

        return from_logits(logits, targets)

    @override
    def scores(self, model: nn.Module, batch: Batch) -> Scored:
        """Compute the columns without the logits of all tokens if the output layer is plain; see `output_layer.py`."""
        from autopeft.evaluators.tasks.output_layer import from_hidden_states

        return from_hidden_states(model, batch) or super().scores(model, batch)
