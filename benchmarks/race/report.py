"""Results of races: tables in Markdown, a figure, and data. No searcher is ahead without an interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np

from autopeft.benchmarks.race.races import ARMS, RaceResult
from autopeft.evaluators.atomic import atomic_write
from autopeft.search_space.problem import Goal
from autopeft.studies.analysis.medians import LEAST_SEEDS, Median, draws, median_of
from autopeft.studies.analysis.pareto import Floats
from autopeft.studies.reports import markdown
from autopeft.studies.versions import versions_of

CHECKPOINTS = (25, 50, 100, 200)
#: The searcher whose last median the others are compared with.
YARDSTICK = "nsga2"
PACKAGES = ("optuna", "botorch", "torch", "scipy")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearcherRow:
    """A searcher on one problem. `shares`: median score by number of evaluations; see `RaceResult.curve`.

    `own_s`: median seconds of a suggestion. `reaches`: evaluations until its median is that of `YARDSTICK` at the end.
    """

    searcher: str
    trials: int
    seeds: int
    shares: Mapping[int, Median]
    own_s: float
    reaches: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareLead:
    """Difference of the best median from the next one, over the seeds that both have."""

    best: str
    second: str
    difference: Median

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the difference is above 0."""
        return self.difference.low is not None and self.difference.low > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceTable:
    """The searchers on one problem. `leads`: by number of evaluations."""

    problem: str
    summary: str
    lines: tuple[SearcherRow, ...]
    leads: Mapping[int, ShareLead]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Results of one searcher on one problem. `shares`: [seeds, trials]."""

    searcher: str
    seeds: tuple[int, ...]
    shares: Floats
    own_s: float

    @property
    def trials(self) -> int:
        """Evaluations of each race."""
        return int(self.shares.shape[1])

    @property
    def median(self) -> Floats:
        """Median over the seeds, [trials]."""
        return np.median(self.shares, axis=0)


def curves_of(ended: Iterable[RaceResult]) -> dict[str, list[Curves]]:
    """Return the curves by problem, searchers in the order of the registry.

    The curve of a searcher that ran out of candidates is continued by its last value.
    """
    found: dict[tuple[str, str, int], dict[int, RaceResult]] = {}
    for entry in ended:
        race = entry.race
        found.setdefault((race.problem, race.searcher, race.trials), {})[race.seed] = entry
    order = list(ARMS)
    curves: dict[str, list[Curves]] = {}
    for problem, searcher, trials in sorted(found, key=lambda place: (order.index(place[1]), place[2])):
        group = [entry for _, entry in sorted(found[problem, searcher, trials].items())]
        curves.setdefault(problem, []).append(
            Curves(
                searcher=searcher,
                seeds=tuple(entry.race.seed for entry in group),
                shares=np.array([_padded(entry.curve, trials) for entry in group]),
                own_s=float(np.median([seconds for entry in group for seconds in entry.own_s])),
            )
        )
    return curves


def _padded(curve: Sequence[float], trials: int) -> list[float]:
    return [*curve, *[curve[-1] if curve else 0.0] * (trials - len(curve))]


def table_of(problem: str, summary: str, curves: Sequence[Curves]) -> RaceTable:
    """Return the table of one problem."""
    most = max(group.trials for group in curves)
    checkpoints = sorted({point for point in CHECKPOINTS if point < most} | {most})
    yardstick = max((g for g in curves if g.searcher == YARDSTICK), key=lambda g: g.trials, default=None)
    lines = tuple(
        SearcherRow(
            searcher=group.searcher,
            trials=group.trials,
            seeds=len(group.seeds),
            shares={point: median_of(group.shares[:, point - 1]) for point in checkpoints if point <= group.trials},
            own_s=group.own_s,
            reaches=None if yardstick is None else _reaches(group.median, yardstick.median[-1]),
        )
        for group in curves
    )
    leads = {point: lead for point in checkpoints if (lead := lead_at(point, curves)) is not None}
    return RaceTable(problem=problem, summary=summary, lines=lines, leads=leads)


def _reaches(curve: Floats, level: float) -> int | None:
    there = np.flatnonzero(curve >= level)
    return int(there[0]) + 1 if len(there) else None


def lead_at(point: int, curves: Sequence[Curves]) -> ShareLead | None:
    """Return the lead after `point` evaluations, paired by seed: searchers with the same seed meet the same noise."""
    there = [group for group in curves if point <= group.trials]
    if len(there) < 2:
        return None
    first, second = sorted(there, key=lambda group: group.median[point - 1], reverse=True)[:2]
    common = sorted(set(first.seeds) & set(second.seeds))
    if not common:
        return None
    a, b = (group.shares[[group.seeds.index(s) for s in common], point - 1] for group in (first, second))
    value = float(np.median(a) - np.median(b))
    low = high = None
    if len(common) >= LEAST_SEEDS:
        drawn = draws(len(common))
        drawn = np.median(a[drawn], axis=1) - np.median(b[drawn], axis=1)
        low, high = (float(q) for q in np.quantile(drawn, [0.025, 0.975]))
    difference = Median(value=value, low=low, high=high)
    return ShareLead(best=_label(first, curves), second=_label(second, curves), difference=difference)


def _label(row: Curves | SearcherRow, rows: Sequence[Curves | SearcherRow]) -> str:
    """Return the searcher's name, with its number of trials where it ran shorter than the others."""
    return row.searcher if row.trials == max(r.trials for r in rows) else f"{row.searcher} ({row.trials} trials)"


# Markdown and data


def to_dict(tables: Sequence[RaceTable], batch: int, goal: Goal = "front") -> dict[str, Any]:
    """Return the tables as data."""
    return {
        "batch": batch,
        "goal": goal,
        "versions": versions_of(PACKAGES),
        "tables": [asdict(table) for table in tables],
    }


SCORES = {
    "front": "Share of the known front's hypervolume after so many evaluations",
    "cheapest_as_good": "Cost of the cheapest candidate that is as good as the best, over that of the cheapest such"
    " candidate among so many evaluations (0: none)",
}


def to_markdown(tables: Sequence[RaceTable], batch: int, goal: Goal = "front") -> str:
    """Return a section with a table for each problem."""
    used = ", ".join(f"{name} {number}" for name, number in versions_of(PACKAGES).items())
    head = (
        f"{SCORES[goal]}: median over seeds, with the central 95 % of"
        f" bootstrap draws of the seeds. Batches of {batch}; one thread per searcher; {used}."
    )
    return "\n\n".join([head, *map(_section, tables)]) + "\n"


def _section(table: RaceTable) -> str:
    points = sorted({point for line in table.lines for point in line.shares})
    best = {point: max(line.shares[point].value for line in table.lines if point in line.shares) for point in points}
    rows = [[f"`{table.problem}`", *map(str, points), f"trials to {YARDSTICK}'s last", "seeds", "s per suggestion"]]
    for line in table.lines:
        cells = [_cell(line.shares.get(point), best[point]) for point in points]
        reaches = "-" if line.reaches is None else str(line.reaches)
        rows.append([_label(line, table.lines), *cells, reaches, str(line.seeds), f"{line.own_s:.3f}"])
    rows.append(["best minus next", *(_lead(table.leads.get(point)) for point in points), "", "", ""])
    summary = f"{table.summary[0].upper()}{table.summary[1:]}."
    return "\n\n".join([f"### {table.problem}", summary, markdown.table(rows), _verdict(table)])


def _cell(found: Median | None, best: float) -> str:
    if found is None:
        return "-"
    return f"**{found}**" if found.value == best else str(found)


def _lead(lead: ShareLead | None) -> str:
    return "-" if lead is None else f"{lead.difference} over {lead.second}"


def _verdict(table: RaceTable) -> str:
    if not table.leads:
        return "One searcher alone: nothing to compare."
    point, lead = max(table.leads.items())
    if lead.is_clear:
        return f"After {point} evaluations {lead.best} is ahead of {lead.second}, the next best."
    if lead.difference.low is None:
        return f"Fewer than {LEAST_SEEDS} seeds: no interval, and no claim."
    return f"After {point} evaluations {lead.best} and {lead.second} cannot be told apart."


# Picture


def picture(curves: Mapping[str, Sequence[Curves]], path: str | PathLike[str]) -> None:
    """Draw one panel per problem: median over the seeds, and its interval as a band."""
    import matplotlib
    from matplotlib.figure import Figure

    from autopeft.studies.reports.front_layout import COLOURS
    from autopeft.studies.reports.pictures import DASHES, DPI, STYLE

    style = {name: (COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS)]) for i, name in enumerate(ARMS)}
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * columns + 1.2, 3.0 * rows + 0.3), dpi=DPI, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        handles: dict[str, Any] = {}
        for panel, (problem, groups) in zip(panels, curves.items(), strict=False):
            for group in groups:
                colour, dashes = style[group.searcher]
                number = np.arange(1, group.trials + 1)
                (line,) = panel.plot(number, group.median, color=colour, linestyle=dashes, linewidth=1.6)
                handles.setdefault(group.searcher, line)
                if len(group.seeds) >= LEAST_SEEDS:
                    low, high = _band(group.shares)
                    panel.fill_between(number, low, high, color=colour, alpha=0.15, linewidth=0)
            panel.set_title(problem, loc="left", fontweight="bold", fontsize=10)
            panel.set_xlabel("evaluations")
            panel.margins(x=0.01)
            # The first few points of a curve would compress the rest.
            early = [float(group.median[min(9, group.trials - 1)]) for group in groups]
            panel.set_ylim(bottom=max(0.0, min(early) - 0.05), top=1.005)
        for panel in panels[len(curves) :]:
            panel.set_axis_off()
        for panel in panels[::columns]:
            panel.set_ylabel("score")
        figure.legend(list(handles.values()), list(handles), loc="outside right upper")
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png")


def _band(shares: Floats) -> tuple[Floats, Floats]:
    """Return the lower and upper ends [trials] of the median's interval, from shares [seeds, trials]."""
    drawn = draws(len(shares))[:1000]
    low, high = np.quantile(np.median(shares[drawn], axis=1), [0.025, 0.975], axis=0)
    return low, high
