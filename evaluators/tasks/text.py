"""The common base of tasks over texts: a tokenizer encodes the rows, and examples are rows of token ids."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from autopeft.evaluators.errors import DataError, ModelError
from autopeft.evaluators.tasks.base import Batch, Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Optional inputs of an example besides `input_ids`, with one number per token and 0 as the default.
_PER_TOKEN = ("token_type_ids",)


class TextTask(Task):
    """A task whose examples have `input_ids`, and `token_type_ids` if the tokenizer marks the second text by them."""

    processor_name = "tokenizer"
    auto_processor = "AutoTokenizer"

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
    def check(self, model: Any, examples: Iterable[Example]) -> None:
        examples = list(examples)
        lengths = [self.length(example) for example in examples]
        if not min(lengths):
            raise DataError(["a row has no tokens: its characters are not in the vocabulary of the model's tokenizer"])
        longest, limit = max(lengths), max_tokens(model)
        if longest > limit:
            raise DataError(
                [f"data.max_length: a row has {longest} tokens; set at most {limit}, the limit of the model"]
            )
        num_embeddings = model.get_input_embeddings().num_embeddings
        ids = (token for example in examples for token in example["input_ids"])
        if max(self.tokenizer.pad_token_id, max(ids)) >= num_embeddings:
            raise DataError(
                [f"the tokenizer does not fit: it has token ids beyond the model's {num_embeddings} embeddings"]
            )
        types = max((max(example["token_type_ids"]) for example in examples if "token_type_ids" in example), default=0)
        # Without a count (or with 0), a model that takes types has no embeddings for them, so none can be missing.
        count = getattr(model.config, "type_vocab_size", None)
        takes = "token_type_ids" in inspect.signature(model.forward).parameters
        if types and (not takes or (count and types >= count)):
            raise DataError(
                [f"the tokenizer marks a second text by token_type_ids {types}, which the model does not support: set"
                 " the tokenizer's model_input_names to input_ids and attention_mask"]
            )  # fmt: skip

    @override
    def length(self, example: Example) -> int:
        return len(example["input_ids"])

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
