"""The common base of tasks over texts: a tokenizer encodes the rows, and examples are rows of token ids."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from autopeft.evaluators.errors import DataError, ModelError
from autopeft.evaluators.tasks.base import Batch, Cut, Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Optional inputs of an example besides `input_ids`, with one number per token and 0 as the default.
_PER_TOKEN = ("token_type_ids",)
#: The part of a text that the tokenizer has no tokens for.
UNKNOWN = {"most of a text": "the model's tokenizer does not know its words: use a model of its language"}


class TextTask(Task):
    """A task whose examples have `input_ids`, and `token_type_ids` if the tokenizer marks the second text by them."""

    processor_name = "tokenizer"
    auto_processor = "AutoTokenizer"
    #: Entries of an example with a target per token.
    targets_per_token: ClassVar[tuple[str, ...]] = ()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor under its usual name."""
        return self.processor

    @override
    @classmethod
    def load_processor(cls, model_id: str, folder: str, revision: str | None) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=False)
        # Without tokenizer files, transformers creates a tokenizer of the right class with an empty vocabulary.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ModelError(f"{model_id}: the model has no tokenizer files")
        if tokenizer.pad_token is None:
            # Padding is masked everywhere, so any token will do.
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        return tokenizer

    @override
    @classmethod
    def configure(cls, model: Any, processor: Any) -> None:
        # Classifiers that read the last token of a row need the padding token of the batches.
        model.config.pad_token_id = processor.pad_token_id

    @override
    def limit(self, model: Any) -> int:
        return max_tokens(model)

    @override
    def misfits(self, model: Any, examples: Sequence[Example]) -> Iterator[tuple[int | None, str]]:
        limit, num_embeddings = max_tokens(model), model.get_input_embeddings().num_embeddings
        # Without a count (or with 0), a model that takes types has no embeddings for them, so none can be missing.
        takes = "token_type_ids" in inspect.signature(model.forward).parameters
        num_types = (getattr(model.config, "type_vocab_size", None) or sys.maxsize) if takes else 1
        padding = self.tokenizer.pad_token_id or 0
        if padding >= num_embeddings:
            what = f"its padding token has the id {padding}, beyond the model's {num_embeddings} embeddings"
            yield None, f"the tokenizer does not fit: {what}"
        for position, example in enumerate(examples):
            ids, types = example["input_ids"], max(example.get("token_type_ids", (0,)))
            if not ids:
                yield position, "has no tokens: its characters are not in the vocabulary of the model's tokenizer"
                continue
            if len(ids) > limit:
                yield position, f"has more tokens than the model takes: set data.max_length to at most {limit}"
            if max(ids) >= num_embeddings:
                what = f"has token ids beyond the model's {num_embeddings} embeddings"
                yield position, f"{what}: the tokenizer does not fit the model"
            if types >= num_types:
                what = f"the tokenizer marks a second text by token_type_ids {types}, which the model does not support"
                yield position, f"{what}: set the tokenizer's model_input_names to input_ids and attention_mask"

    def tokens(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Return the inputs of texts (or pairs) with special tokens, and `cut` and `unread` as `encode` has them.

        In a pair, the longer text is cut at its end, token by token (the tokenizer's "longest_first").
        """
        added = self.tokenizer.num_special_tokens_to_add(pair=pairs is not None)
        if self.max_length < added + (1 if pairs is None else 2):
            raise DataError(
                [f"data.max_length: {self.max_length} is too short: the tokenizer adds {added} special tokens, so"
                 " nothing of a text would be left"]
            )  # fmt: skip
        found = self._tokenised(texts, pairs, verbose=False)
        long = [i for i, example in enumerate(found) if len(example["input_ids"]) > self.max_length]
        if long:
            seconds = None if pairs is None else [pairs[i] for i in long]
            cut = self._tokenised([texts[i] for i in long], seconds, truncation=True, max_length=self.max_length)
            for i, example in zip(long, cut, strict=True):
                lost = len(found[i]["input_ids"]) - len(example["input_ids"])
                found[i] = {**example, "cut": Cut(text=lost)}
        for example in found:
            ids = example["input_ids"]
            if 2 * ids.count(self.tokenizer.unk_token_id) > max(len(ids) - added, 0):
                example["unread"] = UNKNOWN
        return found

    def _tokenised(self, texts: Sequence[str], pairs: Sequence[str] | None, **settings: Any) -> list[dict[str, Any]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), None if pairs is None else list(pairs), return_attention_mask=False, **settings
        )
        examples: list[dict[str, Any]] = [{"input_ids": ids} for ids in encoded["input_ids"]]
        if pairs is not None:
            for example, types in zip(examples, encoded.get("token_type_ids", ()), strict=False):
                if any(types):  # models with token types use 0 by default
                    example["token_type_ids"] = types
        return examples

    @override
    def length(self, example: Example) -> int:
        return len(example["input_ids"])

    @override
    def shortened(self, example: Example, most: int) -> Example:
        # The end, where the completions of language models are.
        tokens = ("input_ids", *_PER_TOKEN, *self.targets_per_token)
        return {name: value[-most:] if name in tokens else value for name, value in example.items()}

    @override
    def inputs(self, examples: Sequence[Example]) -> Batch:
        """Return input_ids and attention_mask [N, T], padded on the right, and token_type_ids if examples have them."""
        import torch

        width = max(map(self.length, examples))
        ids = torch.full((len(examples), width), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        batch = {"input_ids": ids, "attention_mask": mask}
        batch |= {name: torch.zeros_like(ids) for name in _PER_TOKEN if any(name in example for example in examples)}
        for row, example in enumerate(examples):
            n = self.length(example)
            mask[row, :n] = 1
            for name in ("input_ids", *_PER_TOKEN):
                if name in example:
                    batch[name][row, :n] = torch.as_tensor(example[name])
        return batch


def max_tokens(model: Any) -> int:
    """Return the largest number of tokens per row that the model has positions for."""
    from torch import nn

    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from the one after that of the padding.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
