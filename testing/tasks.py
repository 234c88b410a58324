"""Checks of a task: facts of its class, examples, batches, and the columns that metrics read."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch
import transformers
from torch import nn

from autopeft.evaluators.rows import Row
from autopeft.evaluators.tasks import TASKS, Scored, Task
from autopeft.search_space.metrics.base import TARGET, TARGETS


def check_task(task: Task, rows: Sequence[Row], model: nn.Module) -> None:
    """Check a task with rows and with a model in evaluation mode that takes its batches.

    `rows`: at least two, of different lengths, as `Task.row` returns them. Raises AssertionError, which names the first
    claim that fails.
    """
    _check_class(type(task), rows)
    name = task.name
    examples = task.encode(rows)
    assert len(examples) == len(rows), f"{name}: {len(examples)} examples for {len(rows)} rows"
    lengths = [task.length(example) for example in examples]
    assert all(lengths), f"{name}: an example has the length 0"
    for example, length in zip(examples, lengths, strict=True):
        learnt = task.learnt(example)
        assert learnt is None or len(learnt) == length, f"{name}: learnt has {len(learnt or ())} for {length} positions"
    batch = task.collate(examples)
    for tensor_name, tensor in batch.items():
        assert len(tensor) == len(rows), f"{name}: {tensor_name} is {list(tensor.shape)} for {len(rows)} rows"
    if "input_ids" in batch:
        found, expected = list(batch["input_ids"].shape), [len(rows), max(lengths)]
        assert found == expected, f"{name}: input_ids is {found}, but the lengths of the examples give {expected}"
    columns = task.scores(model, batch)
    assert set(columns) <= task.columns, f"{name}: declares {sorted(task.columns)}, returns {sorted(columns)}"
    with torch.no_grad():
        columns = {**task.scores(model, batch), "loss": columns["loss"]}
    _check_columns(task, columns, rows)
    for i, example in enumerate(examples):
        with torch.no_grad():
            alone = task.scores(model, task.collate([example]))
        for column_name, column in columns.items():
            same = torch.allclose(alone[column_name][0], column[i], atol=1e-5, rtol=1e-5)
            assert same, f"{name}: {column_name} of row {i} depends on the rest of its batch"


def _check_class(kind: type[Task], rows: Sequence[Row]) -> None:
    """Check the claims that need no model."""
    name = kind.name
    assert name in TASKS, f"{name!r} is not a registered task: install its entry point"
    assert TASKS[name].for_rows(rows) is kind, f"{name}: for_rows does not return {kind.__name__} for its own rows"
    assert hasattr(transformers, kind.auto_class), f"{name}: transformers has no {kind.auto_class}"
    labelled = any(kind.labels_of(row) for row in rows)
    assert kind.has_labels == labelled, f"{name}: has_labels is {kind.has_labels}, but labels_of says {labelled}"
    assert kind.has_labels or kind.problem_type is None, f"{name}: problem_type without labels"
    for row in rows:
        json.dumps(kind.input_of(row))  # the search for inputs in two splits compares them as JSON


def _check_columns(task: Task, columns: Scored, rows: Sequence[Row]) -> None:
    """Check names, shapes, values and gradients of the columns, and the targets among them."""
    name = task.name
    assert "loss" in task.columns, f"{name}: the column `loss` is missing"
    assert set(columns) == task.columns, f"{name}: declares {sorted(task.columns)}, returns {sorted(columns)}"
    for column_name, column in columns.items():
        shape, allowed = list(column.shape), [[len(rows)]]
        if column_name != "loss":
            allowed.append([len(rows), len(task.labels)])
            assert not column.requires_grad, f"{name}: {column_name} has a gradient, which keeps a step's graph alive"
        assert shape in allowed, f"{name}: {column_name} has the shape {shape}, allowed: {allowed}"
        assert bool(torch.isfinite(column.float()).all()), f"{name}: {column_name} is not finite"
    assert columns["loss"].requires_grad, f"{name}: the loss cannot be differentiated"
    truth = task.truth(rows, task.labels)
    if truth is not None:
        targets = columns.get(TARGETS, columns.get(TARGET))
        assert targets is not None, f"{name}: truth returns targets, but there is no column {TARGET} or {TARGETS}"
        assert np.array_equal(truth, targets.cpu().numpy()), f"{name}: truth differs from the column of targets"
