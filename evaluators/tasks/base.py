"""A task: how rows become tensors, and how logits become losses and what else metrics are made of.

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
#: By name, [N] each: see `search_space/metrics/base.py`. `loss` is the one that is differentiated.
Scored = dict[str, Tensor]
IGNORED = -100
#: What a batch tells others than the model.
BESIDE_THE_MODEL = ("targets", "domains")


def model_inputs(batch: Batch) -> Batch:
    """What of a batch the model reads."""
    return {name: tensor for name, tensor in batch.items() if name not in BESIDE_THE_MODEL}


class Task(ABC):
    """`encode` once, `collate` per batch; `score` on the logits of the transformers model."""

    name: ClassVar[str]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labels: Sequence[str] | None,
        domains: Sequence[str] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.labels = tuple(labels or ())
        self.domains = tuple(domains or ())

    @abstractmethod
    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Token ids and targets, not padded, and `domain` of each row."""

    def domain(self, row: Mapping[str, Any]) -> dict[str, int]:
        """The part of an example that says which domain it is of; nothing where there are none."""
        return {"domain": self.domains.index(row["domain"])} if self.domains else {}

    @abstractmethod
    def targets(self, examples: Sequence[Example], width: int) -> Tensor:
        """What `score` compares with: [N] or [N, width]."""

    @abstractmethod
    def score(self, logits: Tensor, targets: Tensor) -> Scored:
        """The columns of each example: `loss` (cross-entropy), differentiable, `accuracy`, and what metrics over a set
        need.
        """

    def scores(self, model: nn.Module, batch: Batch) -> Scored:
        """The columns of a collated batch: the forward pass and `score`."""
        return self.score(model(**model_inputs(batch)).logits, batch["targets"])

    def collate(self, examples: Sequence[Example]) -> Batch:
        """input_ids and attention_mask [N, T], padded on the right to the longest example, the targets, and where
        there are domains, `domains` [N].
        """
        width = max(len(example["input_ids"]) for example in examples)
        ids = torch.full((len(examples), width), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            n = len(example["input_ids"])
            ids[row, :n] = torch.as_tensor(example["input_ids"])
            mask[row, :n] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "targets": self.targets(examples, width)}
        if self.domains:
            batch["domains"] = torch.tensor([example["domain"] for example in examples])
        return batch
