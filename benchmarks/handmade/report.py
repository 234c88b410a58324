"""The report of the arms: how good and how small what they recommend is, beside the better rule of the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from scipy.special import stdtrit
from scipy.stats import binomtest

from autopeft.benchmarks.handmade.arms import ARMS, SWEEP, Verified
from autopeft.search_space.metrics.base import POINT
from autopeft.studies.reports.markdown import table
from autopeft.studies.storage import json_lines


def read(path: Path) -> list[Verified]:
    """Read the results of a file."""
    return [Verified(**{**entry, "test": tuple(entry["test"])}) for entry in json_lines.read(path)]


def append(path: Path, found: Sequence[Verified]) -> None:
    """Append results to a file."""
    for one in found:
        json_lines.append(path, asdict(one))


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The studies of one arm beside the better rule of the sweep with the same data and seed.

    `differences`: of the mean test scores; `ratios`: of the parameters.
    """

    arm: str
    data: str
    differences: tuple[float, ...]
    ratios: tuple[float, ...]
    took_s: float
    trainings: float


def comparisons(found: Sequence[Verified]) -> list[Comparison]:
    """Compare every arm, on each data set and on all of them."""
    rules: dict[tuple[str, int], Verified] = {}
    for one in found:
        if one.arm.startswith(SWEEP):
            where = one.data, one.seed
            if where not in rules or one.mean > rules[where].mean:
                rules[where] = one
    rows = []
    names = list(dict.fromkeys(one.data for one in found))
    groups = [[name] for name in names]
    groups = [names, *groups] if len(names) > 1 else groups
    for arm in ARMS[1:]:
        for data in groups:
            own = [one for one in found if one.arm == arm and one.data in data and (one.data, one.seed) in rules]
            if own:
                best = [rules[one.data, one.seed] for one in own]
                rows.append(
                    Comparison(
                        arm=arm,
                        data="all" if len(data) > 1 else data[0],
                        differences=tuple(a.mean - b.mean for a, b in zip(own, best, strict=True)),
                        ratios=tuple(a.num_params / b.num_params for a, b in zip(own, best, strict=True)),
                        took_s=fmean(one.took_s for one in own),
                        trainings=fmean(one.trainings for one in own),
                    )
                )
    return rows


def to_dict(found: Sequence[Verified]) -> dict[str, Any]:
    """Return results and comparisons as plain data for JSON."""
    return {"results": [asdict(one) for one in found], "comparisons": [asdict(one) for one in comparisons(found)]}


def to_markdown(found: Sequence[Verified]) -> str:
    """Return a row per arm and data set as Markdown."""
    rows = [
        (
            "arm", "data", "studies", "within a point (95 %)", "better", "difference in points (95 %)",
            "parameters, median ratio", "trainings", "s",
        )
    ]  # fmt: skip
    for one in comparisons(found):
        n = len(one.differences)
        within = sum(round(d, 9) >= -POINT for d in one.differences)
        share = binomtest(within, n).proportion_ci(method="wilson")
        mean, text = fmean(one.differences), ""
        if n > 2:
            half = float(np.std(one.differences, ddof=1)) / n**0.5 * float(stdtrit(n - 1, 0.975))
            text = f" ({100 * (mean - half):+.1f} to {100 * (mean + half):+.1f})"
        rows.append(
            (
                one.arm,
                one.data,
                f"{n}",
                f"{within} of {n} ({share.low:.0%} to {share.high:.0%})",
                f"{sum(d > 0 for d in one.differences)}",
                f"{100 * mean:+.1f}{text}",
                f"{median(one.ratios):.3f}",
                f"{one.trainings:.0f}",
                f"{one.took_s:.0f}",
            )
        )
    return table(rows, right=(2, 4, 6, 7, 8)) + "\n"
