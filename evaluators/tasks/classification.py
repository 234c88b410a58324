"""Classification of a text into one of several labels."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from autopeft.evaluators.tasks.base import Task
from autopeft.search_space.metrics.base import PREDICTION, TARGET


class Classification(Task):
    name = "classification"

    def encode(self, rows):
        encoded = self.tokenizer([row["text"] for row in rows], truncation=True, max_length=self.max_length)
        position = {label: i for i, label in enumerate(self.labels)}
        return [
            {"input_ids": ids, "label": position[row["label"]], **self.domain(row)}
            for ids, row in zip(encoded["input_ids"], rows, strict=True)
        ]

    def targets(self, examples, width):
        return torch.tensor([example["label"] for example in examples])

    def score(self, logits, targets):
        losses = cross_entropy(logits.float(), targets, reduction="none")
        predictions = logits.detach().argmax(-1)
        accuracies = (predictions == targets).float()
        return {"loss": losses, "accuracy": accuracies, TARGET: targets, PREDICTION: predictions}
