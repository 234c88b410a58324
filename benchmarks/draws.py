"""One study with several search seeds: what it recommends each time, beside a baseline.

A single study shows one draw of a searcher and of the seeds of trainings. This shows the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from autopeft.search_space.metrics import Metric
from autopeft.studies.analysis.recommendation import amount, difference_text
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.analysis.statistics import Estimate, paired_difference
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.check import check
from autopeft.studies.engine.session import open_ledger, open_study, read_snapshot, was_started
from autopeft.studies.engine.watcher import Watcher
from autopeft.studies.reports.markdown import table


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """The end of one study. `validation`, `test`: quality of the recommended member minus that of the baseline."""

    seed: int
    candidate: str
    num_params: int
    quality: float
    test: float | None
    baseline_num_params: int
    baseline_quality: float
    baseline_test: float | None
    margin: float
    validation_difference: Estimate
    test_difference: Estimate | None

    @property
    def as_good(self) -> bool:
        """Whether the member is shown to be within the margin of the baseline, on the validation rows."""
        return self.validation_difference.low >= -self.margin


def ended(settings: StudyFile, watcher: Watcher) -> Snapshot:
    """Return the final state of a study; run it, or go on with it, if it has not ended."""
    if was_started(settings):
        snapshot = read_snapshot(settings, open_ledger(settings))
        if not snapshot.preliminary:
            return snapshot
    splits, _, _ = check(settings)
    with open_study(settings, splits, resume=was_started(settings)) as study:
        return study.run(watcher)


def draw(snapshot: Snapshot, seed: int, baseline: str) -> Draw:
    """Compare the recommended member of a study with a tuned baseline. Raises KeyError without it."""
    front = snapshot.front()
    other = {row.label: row for row in front.rows}[baseline]
    own = next(row for row in front.members if row.recommended)
    found = front.recommendation
    assert found is not None
    quality = snapshot.quality

    def difference(split: str) -> Estimate | None:
        first, second = (snapshot.entry(row.trial).scores(quality, split) for row in (own, other))
        if not (first.size and second.size):
            return None
        if own is other:
            return Estimate(value=0.0, std_err=0.0, low=0.0, high=0.0, num_seeds=len(first))
        return paired_difference(first, second, spread=snapshot.spread(split))

    validation = difference("validation")
    assert validation is not None
    return Draw(
        seed=seed,
        candidate=own.summary,
        num_params=round(own.values["num_params"]),
        quality=own.values[quality],
        test=own.test.value if own.test else None,
        baseline_num_params=round(other.values["num_params"]),
        baseline_quality=other.values[quality],
        baseline_test=other.test.value if other.test else None,
        margin=found.margin,
        validation_difference=validation,
        test_difference=difference("test"),
    )


def to_dict(draws: Sequence[Draw]) -> list[dict[str, Any]]:
    """Return the draws as plain data for JSON."""
    return [asdict(one) | {"as_good": one.as_good} for one in draws]


def to_markdown(draws: Sequence[Draw], metric: Metric, baseline: str) -> str:
    """Return a row per draw and a sentence on all of them, as Markdown."""
    minus = f"minus {baseline}"
    rows = [("seed", "recommended", "parameters", "validation", minus, "test", minus)]
    for one in draws:
        texts = [
            "–" if found is None else difference_text(found, metric) if found.std_err else "the same"
            for found in (one.validation_difference, one.test_difference)
        ]
        test = "–" if one.test is None else f"{one.test:.3f}"
        quality = f"{one.quality:.3f}"
        rows.append((f"{one.seed}", one.candidate, f"{one.num_params:,}", quality, texts[0], test, texts[1]))
    good = sum(one.as_good for one in draws)
    sizes = [one.num_params for one in draws]
    summary = (
        f"{good} of {len(draws)} recommended candidates are shown to be within {amount(draws[0].margin, metric)} of"
        f" {baseline} ({draws[0].baseline_num_params:,} parameters). They have {median(sizes):,.0f} parameters in the"
        f" median, from {min(sizes):,} to {max(sizes):,}."
    )
    return f"{table(rows, right=(0, 2, 3, 5))}\n\n{summary}\n"
