"""Rows beside an export that trains: those of the study, as it read them, so that no second reader has other rules."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from autopeft.studies.recipes.recipe import Recipe

SPLITS = ("train", "validation")


def write_rows(recipe: Recipe, folder: Path) -> None:
    """Write the rows with the task's own field names, labels as texts. Raises DataError."""
    for split, rows in _rows(recipe).items():
        _write(rows, folder / f"{split}.jsonl")


def write_token_rows(recipe: Recipe, folder: Path) -> None:
    """Write the rows of a language model as token ids, cut to `max_length`; tokens without a loss have the label -100.

    Raises DataError and ModelError.
    """
    from autopeft.evaluators.backbones import load_processor

    origin = recipe.backbone
    task = recipe.task_class(load_processor(origin.id, recipe.task, origin.revision), recipe.data.max_length, None)
    for split, rows in _rows(recipe).items():
        examples = (
            {name: example[name] for name in ("input_ids", "labels")}
            | {"attention_mask": [1] * len(example["input_ids"])}
            for example in task.encode(rows)
        )
        _write(examples, folder / f"{split}.jsonl")


def _rows(recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    from autopeft.evaluators.data.splits import load_splits
    from autopeft.evaluators.errors import DataError

    splits = load_splits(recipe.data.for_loading(), recipe.task)
    if recipe.labels is not None and splits.labels != recipe.labels:
        raise DataError([f"the data has changed: it has the labels {splits.labels}, the recipe has {recipe.labels}"])
    if recipe.contents is not None and (changed := recipe.contents.changes(splits)):
        raise DataError([f"the data has changed: {what}" for what in changed])
    return {split: getattr(splits, split) for split in SPLITS}


def _write(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
