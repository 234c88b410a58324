"""Causal language modelling; in rows with a prompt, only the completion has a loss.

Notation: N examples, T tokens (padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from autopeft.evaluators.errors import DataError, ModelError
from autopeft.evaluators.gguf import EMBEDDED_LLM
from autopeft.evaluators.rows import EMBEDDED_FUNCTIONS, EMBEDDED_IN, DataConfig, Row, field_names, text_of
from autopeft.evaluators.tasks.base import IGNORED, Batch, Cut, Example, Prompted, Scored
from autopeft.evaluators.tasks.chat import prompt_and_answer, unread_parts
from autopeft.evaluators.tasks.conversations import alpaca_of, column_of, conversation_of, is_alpaca, system_column
from autopeft.evaluators.tasks.text import TextTask
from autopeft.evaluators.tasks.turns import Conversation, learnt_tokens, learnt_turns

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autopeft.search_space.backbones.backbone import Backbone


#: Columns of other tools' formats that hold a part of what a row says.
_SYSTEM = ("system", "system_prompt")
_MEDIA = dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "causal-lm reads texts only")
#: Usual columns of a prompt and its completion.
_PAIRS = (("instruction", "response"), ("question", "answer"), ("query", "response"), ("input", "output"))


#: The tokens of a row, which of them are learnt, and the parts of the row that nothing reads.
_Encoded = tuple[list[int], Sequence[bool], Mapping[str, str]]


def _after(prompt: list[int], answer: list[int], unread: Mapping[str, str]) -> _Encoded:
    """Return tokens of which the answer alone is learnt."""
    return [*prompt, *answer], [False] * len(prompt) + [True] * len(answer), unread


def _other_format(row: Row) -> str:
    """Return what to do about the row of another tool's format, as the end of an error; "" for an unknown one."""
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
    has_turns = True
    generates = True
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

        Rows with messages may have tools, as JSON schemas. ShareGPT's conversations become messages, Alpaca's columns a
        prompt and a completion.
        """
        if data.messages in row:
            return conversation_of(row, data.messages, data)
        if data.prompt in row or data.completion in row:
            return {"prompt": text_of(row, data.prompt), "completion": text_of(row, data.completion)}
        if data.text in row:
            return {"text": text_of(row, data.text)}
        if column := column_of(row, data):
            return conversation_of(row, column, data)
        if is_alpaca(row):
            return alpaca_of(row, data)
        raise ValueError(
            f"a row needs the fields {data.prompt!r} and {data.completion!r}, or {data.messages!r}, or {data.text!r};"
            f" this row has {field_names(row)}{_other_format(row)}"
        )

    @override
    @classmethod
    def unread(cls, row: Row, data: DataConfig) -> Mapping[str, str]:
        by_column = data.messages in row
        # ShareGPT's and Alpaca's rows are known by their columns.
        by_name = not any(name in row for name in (data.messages, data.prompt, data.completion, data.text))
        if by_column or by_name:
            known = {**_MEDIA, **dict.fromkeys(_SYSTEM, "name the column of the system prompt in data.system")}
            known |= {"history": "make rows with 'messages'"} if by_name else {}
        elif data.prompt in row:
            known = {**_MEDIA, **dict.fromkeys((*_SYSTEM, "history", "tools"), "make rows with 'messages'")}
            if data.prompt == "instruction":  # the columns of Alpaca and of Dolly
                known["context"] = "write it into 'instruction', as the model will see it"
                known["input"] = "leave out data.prompt and data.completion, and Alpaca's template has it"
        else:
            known = dict(_MEDIA)
        if data.system and not (by_column or by_name):
            known[data.system] = "make rows with 'messages'"
        read = [data.prompt, data.completion, data.text, data.domain_field]
        read += [system_column(row, data)] if by_column or by_name else []
        return {name: advice for name, advice in known.items() if row.get(name) and name not in read}

    @override
    @classmethod
    def retained(cls, row: Row) -> Row:
        # Where a text ends is no part of it: a training on short answers makes an end likelier after any sentence.
        return {**row, "ended": False} if "text" in row else row

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
        whole = iter(self._conversations([row for row in rows if "turns" in row]))
        chats = iter(self._chats([row for row in rows if "messages" in row and "turns" not in row]))
        others = iter(self._plain([row for row in rows if "messages" not in row]))
        return [
            self._example(row, *next(whole if "turns" in row else chats if "messages" in row else others))
            for row in rows
        ]

    def _example(self, row: Row, ids: list[int], learnt: Sequence[bool], unread: Mapping[str, str]) -> dict[str, Any]:
        """Return the example of a row with these tokens, of which those marked in `learnt` have a loss."""
        first = learnt.index(True) if True in learnt else len(ids)
        if len(ids) < 2 or not any(learnt[1:]):  # no token precedes the first one
            raise DataError(["no token is left to predict: the row is too short"])
        # What precedes the first answer is cut at its beginning, so that the answer stays; the rest at its end.
        num_answer = next((i for i in range(first, len(ids)) if not learnt[i]), len(ids)) - first
        cut_prompt = min(first, max(first + num_answer - self.max_length, 0))
        kept = slice(cut_prompt, cut_prompt + self.max_length)
        labels = [token if has_loss else IGNORED for token, has_loss in zip(ids[kept], learnt[kept], strict=True)]
        if all(label == IGNORED for label in labels[1:]):
            raise DataError([f"data.max_length: {self.max_length} is too short: no token is left to predict"])
        example = {"input_ids": ids[kept], "labels": labels, **self.domain(row)}
        if len(ids) > self.max_length:
            example["cut"] = Cut(
                prompt=cut_prompt,
                text=max(len(ids) - kept.stop, 0),
                learnt=sum(learnt[kept.stop :]),
                no_prompt=0 < first <= cut_prompt,
            )
        return {**example, "unread": unread} if unread else example

    def _plain(self, rows: Sequence[Row]) -> Iterator[_Encoded]:
        """Yield the tokens of rows of which the completion or the text is learnt, with the end of text.

        A text that is not `ended` is without it.
        """
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
            yield _after(prompt, [*completion, *(end if row.get("ended", True) else [])], {})

    def _open(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts that may continue: with special tokens at the beginning, none at the end."""
        eos = self.tokenizer.eos_token_id
        return [ids[:-1] if ids and ids[-1] == eos else ids for ids in self._ids(texts)]

    def _ids(self, texts: Sequence[str], **settings: Any) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(texts), verbose=False, **settings)["input_ids"] if texts else []
        return found

    def _chats(self, rows: Sequence[Row]) -> Iterator[_Encoded]:
        """Yield the tokens of conversations of which the last message is learnt, and parts that are not read.

        The template supplies all special tokens, also at the end.
        """
        texts, unread = [], []
        for row in rows:
            messages, tools = row["messages"], row.get("tools")
            prompt, answer = prompt_and_answer(self.tokenizer, messages, tools)
            texts += [prompt, answer]
            unread.append(unread_parts(self.tokenizer, messages, tools, answer))
        ids = self._ids(texts, add_special_tokens=False)
        return map(_after, ids[::2], ids[1::2], unread)

    def _conversations(self, rows: Sequence[Row]) -> Iterator[_Encoded]:
        """Yield the tokens of conversations of which all answers are learnt, and parts that are not read."""
        found = [learnt_turns(self.tokenizer, row["messages"], row.get("tools")) for row in rows]
        if not found:
            return
        fast = getattr(self.tokenizer, "is_fast", False)  # then it knows the places of tokens
        texts = [each.text for each in found]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        for i, each in enumerate(found):
            learnt = learnt_tokens(encoded["offset_mapping"][i], each.spans) if fast else None
            yield (encoded["input_ids"][i], learnt, each.unread) if learnt else self._in_pieces(each)

    def _in_pieces(self, conversation: Conversation) -> _Encoded:
        """Encode the answers and what is between them one by one: no token reaches from one into the next."""
        ids: list[int] = []
        learnt: list[bool] = []
        edges = [0, *chain.from_iterable(conversation.spans), len(conversation.text)]
        pieces = [conversation.text[start:end] for start, end in pairwise(edges)]
        for i, piece in enumerate(self._ids(pieces, add_special_tokens=False)):
            ids += piece
            learnt += [bool(i % 2)] * len(piece)
        return ids, learnt, conversation.unread

    @override
    def shortened(self, example: Example, most: int) -> Example:
        # The end of what is learnt: a question without an answer may follow.
        last = max(i for i, label in enumerate(example["labels"]) if label != IGNORED)
        end = {name: example[name][: last + 1] for name in ("input_ids", "labels")}
        return super().shortened({**example, **end}, most)

    @override
    def learnt(self, example: Example) -> list[bool]:
        # The first token has no other before it that could predict it.
        return [i > 0 and label != IGNORED for i, label in enumerate(example["labels"])]

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
