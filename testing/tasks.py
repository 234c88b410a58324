"""Checks of a task: examples, batches, and the columns that metrics read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from autopeft.evaluators.tasks import Task


def check_task(task: Task, rows: Sequence[dict[str, Any]], model: nn.Module) -> None:
    """Check a task with rows of different lengths and a model that takes its batches, in evaluation mode.

    Raises AssertionError, which names the first claim that fails.
    """
    name = task.name
    examples = task.encode(rows)
    assert len(examples) == len(rows), f"{name}: {len(examples)} examples of {len(rows)} rows"
    assert all(task.length(example) for example in examples), f"{name}: an example has the length 0"
    batch = task.collate(examples)
    for tensor_name, tensor in batch.items():
        assert len(tensor) == len(rows), f"{name}: {tensor_name} is {list(tensor.shape)} for {len(rows)} rows"
    columns = task.scores(model, batch)
    assert "loss" in columns, f"{name}: there is no column `loss`"
    for column_name, column in columns.items():
        assert len(column) == len(rows), (
            f"{name}: {column_name} has the shape {list(column.shape)}, not an entry per row"
        )
        assert bool(torch.isfinite(column.float()).all()), f"{name}: {column_name} is not finite"
    assert columns["loss"].requires_grad, f"{name}: the loss cannot be differentiated"
    for place, example in enumerate(examples):
        alone = task.scores(model, task.collate([example]))
        for column_name, column in columns.items():
            same = torch.allclose(alone[column_name][0], column[place], atol=1e-5, rtol=1e-5)
            assert same, f"{name}: {column_name} of row {place} depends on the rest of its batch"
