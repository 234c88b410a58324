"""Retained rows: what a model should not forget while it learns a task, for the metric `forgetting`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from autopeft.evaluators.data.losses import Unread
from autopeft.evaluators.data.reading import read_split
from autopeft.evaluators.data.splits import RETAINED, Splits, domains_of, unseen
from autopeft.evaluators.errors import DataError
from autopeft.evaluators.rows import FILES, DataConfig, Row
from autopeft.evaluators.tasks import TASKS, Task

#: Two in each part: a score of one row has no standard error.
LEAST_ROWS = 4
COMPARED, TESTED = RETAINED["validation"], RETAINED["test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetainedConfig:
    """The source of the retained rows: `EMBEDDED_PROSE`, or "files" with a `file`, relative to the folder of the data.

    `max_rows`: the size of a random subset, which is always the same; None for all rows.
    """

    source: str
    file: str | None = None
    max_rows: int | None = None


def with_retained(splits: Splits, retained: RetainedConfig, data: DataConfig, task: str) -> Splits:
    """Return the splits with the retained rows, which must be rows of the task, in two random halves.

    Candidates are compared on one, and the other is for the final test; the halves of the same file are always the
    same. `data`: the study's, whose column names a file has. Raises DataError with every problem.
    """
    kind = TASKS[task].for_data(data)
    if retained.source == FILES:
        own = replace(data, source=FILES)
    else:
        own = DataConfig(source=retained.source, train_on_turns=data.train_on_turns)
    name = retained.file or retained.source
    rows, places, unread, problems = read_split(own, name, COMPARED, kind, set())
    if not problems and len(rows) < LEAST_ROWS:
        what = f"{len(rows)} retained rows" if len(rows) > 1 else "one retained row" if rows else "no retained rows"
        problems.append(f"{name}: has {what}; it needs {LEAST_ROWS} at least: two to compare candidates, two to test")
    elif not problems:
        for what, names_of, known in (("label", kind.labels_of, splits.labels), ("domain", domains_of, splits.domains)):
            if known is not None:
                problems += unseen({COMPARED: rows}, {COMPARED: places}, what, names_of, known, data)
    if problems:
        raise DataError(problems)
    order = list(range(len(rows)))
    Random("retained").shuffle(order)
    order = order[: retained.max_rows]
    half = (len(order) + 1) // 2
    parts = {COMPARED: sorted(order[:half]), TESTED: sorted(order[half:])}
    found = {part: [kind.retained(rows[i]) for i in chosen] for part, chosen in parts.items()}
    return replace(
        splits,
        retained=found[COMPARED],
        retained_test=found[TESTED],
        places={**splits.places, **{part: [places[i] for i in chosen] for part, chosen in parts.items()}},
        unread=_joined(
            splits.unread,
            Unread.counted({part: (unread[i] for i in chosen) for part, chosen in parts.items()}),
        ),
        warnings=(*splits.warnings, *_leaks(splits.train, found, kind)),
    )


def _joined(one: Mapping[str, Unread], other: Mapping[str, Unread]) -> dict[str, Unread]:
    """Return the parts of both, with the rows of both where they have the same part."""
    found = dict(one)
    for name, lost in other.items():
        rows = found[name].rows if name in found else Counter[str]()
        found[name] = replace(lost, rows=rows + lost.rows)
    return found


def _leaks(train: Sequence[Row], found: Mapping[str, Sequence[Row]], task: type[Task]) -> Iterator[str]:
    """Yield a warning for retained inputs that are trained on, and for those that are in both parts."""

    def inputs(rows: Sequence[Row]) -> set[str]:
        return {json.dumps(task.input_of(row)) for row in rows}

    compared, tested = inputs(found[COMPARED]), inputs(found[TESTED])
    if trained := len(inputs(train) & (compared | tested)):
        occur = "1 retained input is" if trained == 1 else f"{trained} retained inputs are"
        yield f"{occur} among the training rows: what is trained on is not forgotten, so forgetting will look too small"
    if both := len(compared & tested):
        occur = "1 input occurs" if both == 1 else f"{both} inputs occur"
        yield f"{occur} in both {COMPARED} and {TESTED}: the test of forgetting will be too optimistic"
