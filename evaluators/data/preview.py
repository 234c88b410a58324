"""Rows to look at: their texts as the model reads them, with what is learnt, and how long the rows are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from autopeft.evaluators.data.losses import Encoded
from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.tasks import Example, Task

#: Shares of the rows of a split that have at most a number of tokens.
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """The lengths of a split's rows in tokens, before they are cut.

    `percentiles`: by per cent of the rows, the length that so many do not exceed. `learnt`: tokens with a loss, after
    the cut; None for a task with one target per row. `cut_rows`, `cut_tokens`: what `data.max_length` cuts;
    `cut_learnt`: the tokens with a loss among them.
    """

    rows: int
    tokens: int
    percentiles: dict[int, int]
    longest: int
    learnt: int | None
    cut_rows: int
    cut_tokens: int
    cut_learnt: int

    @classmethod
    def of(cls, task: Task, examples: Sequence[Example]) -> Lengths:
        """Return the lengths of a split's examples."""
        cuts = [example.get("cut") for example in examples]
        lost = [0 if cut is None else cut.prompt + cut.text for cut in cuts]
        lengths = sorted(task.length(example) + cut for example, cut in zip(examples, lost, strict=True))
        learnt = [found for example in examples if (found := task.learnt(example)) is not None]
        return cls(
            rows=len(examples),
            tokens=sum(lengths),
            percentiles={share: lengths[math.ceil(share * len(lengths) / 100) - 1] for share in PERCENTILES},
            longest=lengths[-1],
            learnt=sum(map(sum, learnt)) if learnt else None,
            cut_rows=sum(cut is not None for cut in cuts),
            cut_tokens=sum(lost),
            cut_learnt=sum(cut.learnt for cut in cuts if cut is not None),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the lengths as data."""
        return asdict(self)


def lengths_of(encoded: Encoded) -> dict[str, Lengths]:
    """Return the lengths by split."""
    return {split: Lengths.of(encoded.task, found) for split, found in encoded.examples.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownRow:
    """A row as the model reads it.

    `tokens`: id, the tokenizer's name, and whether it is learnt, of each token. `runs`: the text of neighbouring tokens
    that are all learnt or all not. `labels`: the targets of a row with labels. `cut`: the tokens that it loses.
    """

    place: str
    tokens: list[tuple[int, str, bool]] = field(default_factory=list)
    runs: list[tuple[str, bool]] = field(default_factory=list)
    labels: tuple[str, ...] | None = None
    cut: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the row as data."""
        names = ("id", "token", "learnt")
        return {
            "place": self.place,
            "text": "".join(text for text, _ in self.runs),
            "labels": None if self.labels is None else list(self.labels),
            "cut_tokens": self.cut,
            "runs": [{"text": text, "learnt": learnt} for text, learnt in self.runs],
            "tokens": [dict(zip(names, token, strict=True)) for token in self.tokens],
        }


def shown_rows(splits: Splits, encoded: Encoded, split: str, count: int) -> list[ShownRow]:
    """Return the first rows of a split. Inputs that are no token ids, such as images, are left out."""
    rows, examples = getattr(splits, split)[:count], encoded.examples[split][:count]
    return [
        _shown(encoded.task, row, example, splits.place(split, position))
        for position, (row, example) in enumerate(zip(rows, examples, strict=True))
    ]


def _shown(task: Task, row: Any, example: Example, place: str) -> ShownRow:
    ids = list(example.get("input_ids", ()))
    learnt = task.learnt(example) or [False] * len(ids)
    names = task.processor.convert_ids_to_tokens(ids) if ids else []
    cut = example.get("cut")
    return ShownRow(
        place=place,
        tokens=list(zip(ids, names, learnt, strict=True)),
        runs=[
            (task.processor.decode([token for token, _ in run], clean_up_tokenization_spaces=False), has_loss)
            for has_loss, run in groupby(zip(ids, learnt, strict=True), key=lambda pair: pair[1])
        ],
        labels=tuple(task.labels_of(row)) if task.has_labels else None,
        cut=0 if cut is None else cut.prompt + cut.text,
    )
