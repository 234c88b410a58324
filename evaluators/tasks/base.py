"""A task: how rows become tensors, and how logits become losses and scores.

Notation: N examples, T tokens (padded), C labels, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

Example = Mapping[str, Any]
Batch = dict[str, Tensor]
IGNORED = -100


class Task(ABC):
    """`encode` once, `collate` per batch; `score` on the logits of the transformers model."""

    name: ClassVar[str]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, labels: Sequence[str] | None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.labels = tuple(labels or ())

    @abstractmethod
    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Token ids and targets, not padded."""

    @abstractmethod
    def targets(self, examples: Sequence[Example], width: int) -> Tensor:
        """What `score` compares with: [N] or [N, width]."""

    @abstractmethod
    def score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy [N], differentiable, and accuracy [N] of each example."""

    def scores(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy and accuracy, each [N], of a collated batch: the forward pass and `score`."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "targets"}
        return self.score(model(**inputs).logits, batch["targets"])

    def collate(self, examples: Sequence[Example]) -> Batch:
        """input_ids and attention_mask [N, T], padded on the right to the longest example, and the targets."""
        width = max(len(example["input_ids"]) for example in examples)
        ids = torch.full((len(examples), width), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            n = len(example["input_ids"])
            ids[row, :n] = torch.as_tensor(example["input_ids"])
            mask[row, :n] = 1
        return {"input_ids": ids, "attention_mask": mask, "targets": self.targets(examples, width)}
