"""Replays of recorded trainings under rules for the rungs: who survives, and what it costs (command `rungs`).

The trainings are those of a table (`benchmarks/race/table.py`), all of them trained to the end. A replay draws
candidates in batches, as a search without a model would, and lets a rule stop them at the rungs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import nan
from random import Random
from statistics import fmean
from typing import Any

from autopeft.benchmarks.race.table import RUNGS, TableRow, by_candidate
from autopeft.search_space.metrics.base import POINT
from autopeft.searchers.courses import at_rung
from autopeft.searchers.halving import survivors
from autopeft.searchers.racing import Course, racing
from autopeft.studies.reports.markdown import table

BATCH = 8
#: From losses and parameters of a batch at a rung, and the courses of all before it, to those who continue.
Rule = Callable[[Sequence[Course], Sequence[Course]], Sequence[int]]
RULES: Mapping[str, Rule] = {
    "all": lambda batch, others: range(len(batch)),
    "keep: 0.5": lambda batch, others: survivors([[course.loss, course.cost] for course in batch], 0.5),
    "keep: auto": lambda batch, others: racing(batch, others, POINT),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The end of one replay, with accuracies of single runs.

    `share`: of all training steps. `best_kept`, `cheapest_kept`: whether the best candidate of the draw was trained to
    its end, and the cheapest one within a point of it. `best`: the highest accuracy among those who ended.
    """

    tried: int
    share: float
    best_kept: bool
    cheapest_kept: bool
    best: float


def replay(rule: Rule, drawn: Sequence[TableRow], budget: float) -> Replay:
    """Train `drawn` in batches, as long as the next one ends within a budget in whole trainings."""
    before: dict[float, list[TableRow]] = {rung: [] for rung in RUNGS}
    ended: set[str] = set()
    spent = 0.0
    tried: list[TableRow] = []
    for start in range(0, len(drawn), BATCH):
        alive, done, cost = list(drawn[start : start + BATCH]), 0.0, 0.0
        passed = {}
        for rung in RUNGS:
            cost, done = cost + (rung - done) * len(alive), rung
            courses = [_course(row, rung, ended=False) for row in alive]
            others = [_course(row, rung, ended=row.candidate in ended) for row in before[rung]]
            passed[rung] = alive
            alive = [alive[i] for i in rule(courses, others)]
        cost += (1 - done) * len(alive)
        if spent + cost > budget:
            break
        spent += cost
        tried += drawn[start : start + BATCH]
        ended |= {row.candidate for row in alive}
        for rung in RUNGS:
            before[rung] += passed[rung]
    best = max(tried, key=_accuracy)
    as_good = [row for row in tried if _accuracy(row) >= _accuracy(best) - POINT]
    cheapest = min(as_good, key=lambda row: row.measurement.values["num_params"])
    return Replay(
        tried=len(tried),
        share=spent / len(tried),
        best_kept=best.candidate in ended,
        cheapest_kept=cheapest.candidate in ended,
        best=max((_accuracy(row) for row in tried if row.candidate in ended), default=nan),
    )


def _course(row: TableRow, rung: float, *, ended: bool) -> Course:
    loss = at_rung(row.measurement, rung)
    assert loss is not None
    return Course(loss=loss, cost=row.measurement.values["num_params"], final=-_accuracy(row) if ended else None)


def _accuracy(row: TableRow) -> float:
    return row.measurement.values["accuracy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Means over the replays of one rule: of the same 40 candidates, and of the same steps as 40 whole trainings."""

    rule: str
    best_kept: float
    cheapest_kept: float
    share: float
    tried: float
    best: float


def summaries(rows: Sequence[TableRow], *, replays: int, candidates: int = 40) -> list[Summary]:
    """Replay every rule over draws of the candidates' first trainings, the same draws for all rules."""
    first = [group[0] for group in by_candidate(rows).values()]
    draws = [Random(seed).sample(first, len(first)) for seed in range(replays)]
    found = []
    for name, rule in RULES.items():
        same = [replay(rule, drawn[:candidates], float(candidates)) for drawn in draws]
        equal = [replay(rule, drawn, float(candidates)) for drawn in draws]
        found.append(
            Summary(
                rule=name,
                best_kept=fmean(one.best_kept for one in same),
                cheapest_kept=fmean(one.cheapest_kept for one in same),
                share=fmean(one.share for one in same),
                tried=fmean(one.tried for one in equal),
                best=fmean(one.best for one in equal),
            )
        )
    return found


def to_dict(found: Sequence[Summary]) -> list[dict[str, Any]]:
    """Return the rows as plain data for JSON."""
    return [asdict(one) for one in found]


def to_markdown(found: Sequence[Summary]) -> str:
    """Return a row per rule as Markdown."""
    rows = [
        ("rule", "the best survives", "the cheapest as good survives", "steps", "tried at equal steps", "best found")
    ]
    rows += [
        (
            one.rule,
            f"{one.best_kept:.0%}",
            f"{one.cheapest_kept:.0%}",
            f"{one.share:.0%}",
            f"{one.tried:.0f}",
            f"{one.best:.4f}",
        )
        for one in found
    ]
    return table(rows, right=range(1, 6)) + "\n"
