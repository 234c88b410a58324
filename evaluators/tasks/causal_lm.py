"""Causal language modelling; in rows with a prompt, only the completion has a loss.

Notation: N examples, T tokens (padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from autopeft.evaluators.errors import DataError, ModelError
from autopeft.evaluators.rows import EMBEDDED_IN, DataConfig, Row, field_names, text_of
from autopeft.evaluators.tasks.base import IGNORED, Batch, Example, Scored
from autopeft.evaluators.tasks.text import TextTask

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autopeft.search_space.backbones.backbone import Backbone


class CausalLM(TextTask):
    """Next-token prediction; scores of an example are means over its predicted tokens: cross-entropy and accuracy."""

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"
    trainer = "SFTTrainer"

    @override
    @classmethod
    def problems(cls, data: DataConfig, model_id: str) -> Iterator[tuple[tuple[str, ...], str]]:
        if data.source in EMBEDDED_IN:
            yield ("data", "source"), "the embedded data is for classification: set data.source to your own data"
        if model_id == "embedded":
            yield ("model", "id"), "the embedded model is an encoder: set model.id to a causal language model"
        for name in ("text_pair", "labels"):
            if getattr(data, name) is not None:
                yield ("data", name), "can be set only for classification"

    @override
    @classmethod
    def row(cls, row: Row, data: DataConfig) -> Row:
        """Return a row in TRL's formats: prompt and completion (loss on the completion), messages, or text."""
        if "messages" in row:
            return {"messages": _messages(row["messages"])}
        if data.prompt in row or data.completion in row:
            return {"prompt": text_of(row, data.prompt), "completion": text_of(row, data.completion)}
        if data.text in row:
            return {"text": text_of(row, data.text)}
        raise ValueError(
            f"a row needs the fields {data.prompt!r} and {data.completion!r}, or 'messages', or {data.text!r}; this"
            f" row has {field_names(row)}"
        )

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
        return [self._encode(row) for row in rows]

    def _encode(self, row: Row) -> Example:
        prompt, completion = self._chat(row["messages"]) if "messages" in row else self._plain(row)
        # A long prompt is cut at its beginning, because the completion has the loss.
        num_prompt = min(len(prompt), max(self.max_length - len(completion), 0))
        prompt = prompt[len(prompt) - num_prompt :]
        labels = [*[IGNORED] * num_prompt, *completion][: self.max_length]
        if all(label == IGNORED for label in labels[1:]):  # no token precedes the first one
            raise DataError(
                [f"data.max_length: {self.max_length} is too short: no token is left to predict in the row {row!r:.80}"]
            )
        return {"input_ids": [*prompt, *completion][: self.max_length], "labels": labels, **self.domain(row)}

    def _plain(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Return the tokens of prompt and completion, or none and the tokens of the text; the end of text is learnt."""
        eos = self.tokenizer.eos_token_id
        end = [] if eos is None else [eos]
        if "text" in row:
            return [], [*self._open(row["text"]), *end]
        prompt, whole = self._open(row["prompt"]), self._open(row["prompt"] + row["completion"])
        if whole[: len(prompt)] == prompt:
            return prompt, [*whole[len(prompt) :], *end]
        # A token would span the boundary, but a generation that continues the prompt cannot produce it.
        return prompt, [*self.tokenizer(row["completion"], add_special_tokens=False)["input_ids"], *end]

    def _open(self, text: str) -> list[int]:
        """Return the tokens of a text that may continue: with special tokens at the beginning, none at the end."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[int]]:
        """Return the tokens before the last message and the tokens of the last message, the completion.

        The template supplies all special tokens, also at the end.
        """
        if self.tokenizer.chat_template is None:
            raise DataError(["rows with 'messages' need a chat template, but the model's tokenizer has none"])
        prompt = self.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = self.tokenizer.apply_chat_template(messages, tokenize=False)
        if not whole.startswith(prompt):
            raise DataError(
                [
                    "the model's chat template changes the text before the last message, so the answer cannot be cut"
                    " off: use rows with a prompt and a completion"
                ]
            )
        prompt_ids, completion_ids = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole[len(prompt) :])
        )
        return prompt_ids, completion_ids

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


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError("'messages' must be a list of objects with 'role' and 'content'")
    messages = [{"role": message.get("role"), "content": message.get("content")} for message in value]
    for number, message in enumerate(messages):
        if not all(isinstance(text, str) for text in message.values()):
            raise ValueError(f"message {number}: 'role' and 'content' must be texts")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("'messages' must end with a message of the role 'assistant' that answers an earlier message")
    return messages
