"""Trials that cannot be compared with the others of their study, so that no report and no search reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.metrics import FORGETTING
from autopeft.search_space.problem import Measurement, Trial

T = TypeVar("T", bound=Hashable)


def incomparable(
    trials: Sequence[Trial], objectives: Collection[str], backbone: Backbone, missing: Collection[int] = ()
) -> dict[int, str]:
    """Return by their numbers the trials that cannot be compared with the others, and why.

    Those are trials without a value of an objective, with adapters at sites that the model lacks, with scores of other
    metrics or of another number of rows than most trials have (the first ones among equals), and the runs that repeat
    one of these or one that is `missing`.
    """
    known = {site.name for site in backbone.sites}
    found: dict[int, str] = {}
    for trial in trials:
        values = trial.measurement.values if trial.measurement is not None else {}
        lacking = [name for name in objectives if name not in values]
        if trial.state in ("complete", "pruned") and lacking:
            found[trial.number] = f"it has no value of {', '.join(lacking)}"
        elif unknown := [site for site, _ in trial.candidate.architecture if site not in known]:
            found[trial.number] = f"it has an adapter at {unknown[0]}, a site that the model lacks"
    scored = {t.number: t.measurement for t in trials if t.state == "complete" and t.measurement is not None}
    scored = {number: measurement for number, measurement in scored.items() if number not in found}
    usual = _usual(_names(measurement, objectives) for measurement in scored.values())
    for number, measurement in scored.items():
        names = _names(measurement, objectives)
        if measurement.per_example and usual and names != usual:
            scores = " and ".join(names or measurement.per_example)
            found[number] = f"it has scores of {scores}, the others of {' and '.join(usual)}"
    for split in ("validation", "test"):
        rows = {number: _rows(m, split) for number, m in scored.items() if number not in found}
        # By metric: one of a domain or of retained rows has another number of rows.
        for name in dict.fromkeys(name for counts in rows.values() for name in counts):
            usual_rows = _usual(counts[name] for counts in rows.values() if name in counts)
            for number, counts in rows.items():
                if number not in found and counts.get(name, usual_rows) != usual_rows:
                    what = "retained" if name == FORGETTING.name else split
                    found[number] = f"it has scores of {counts[name]} {what} rows, the others of {usual_rows}"
    return found | dict(_repeats(trials, {*missing, *found}))


def _names(measurement: Measurement, objectives: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in objectives if name in measurement.per_example)


def _rows(measurement: Measurement, split: str) -> dict[str, int]:
    """Return the number of scores by metric; one of a domain has those of its rows, `forgetting` of others."""
    columns = measurement.per_example if split == "validation" else measurement.test_per_example
    return {name: len(column) for name, column in columns.items()}


def _usual(values: Iterable[T]) -> T | None:
    most = Counter(values).most_common(1)  # the first one among equals
    return most[0][0] if most else None


def _repeats(trials: Sequence[Trial], left_out: Collection[int]) -> Iterator[tuple[int, str]]:
    for trial in trials:
        if trial.of in left_out and trial.number not in left_out:
            yield trial.number, f"it repeats trial {trial.of}, which is left out"


def left_out_notes(left_out: Mapping[int, str]) -> list[str]:
    """Return a sentence for reports on each of these trials."""
    return [f"Left out: trial {number}: {why}." for number, why in left_out.items()]
