"""The table of docs/adapters.md: quality with its interval, cost, and whether a row is on the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from autopeft.benchmarks.adapters.rows import PARTS, RATES
from autopeft.benchmarks.adapters.runs import TUNING_SEED, Results, RowCosts, Run, best_rate, metrics_of
from autopeft.evaluators.atomic import atomic_write_text
from autopeft.search_space.dominance import non_dominated
from autopeft.search_space.metrics import Metric
from autopeft.studies.analysis.pareto import Floats
from autopeft.studies.analysis.recommendation import Contender, recommend
from autopeft.studies.analysis.statistics import Estimate, SeedSpread, estimate, paired_difference
from autopeft.studies.config.loading import load_study
from autopeft.studies.reports.markdown import table, with_section

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"
BEGIN, END = "<!-- written by benchmarks/adapters/report.py -->", "<!-- end of what it writes -->"
NOT_MEASURED = "**Not measured.**"
TITLES = {"encoder": "An encoder", "llm": "A language model"}

#: "yes": no row with at most as many parameters has as good a mean. "no": one is shown to be better. "open": one has as
#: good a mean or a better one, but is not shown to be better.
OnFront = Literal["yes", "open", "no"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One row of the table. `estimates`: by metric, on the test rows. `step`, `memory`: over those of LoRA."""

    kind: str
    size: str
    setting: str
    num_params: float
    stored_bytes: float
    learning_rate: float
    seeds: tuple[int, ...]
    estimates: Mapping[str, Estimate]
    step: float
    memory: float
    on_front: OnFront

    @property
    def name(self) -> str:
        """Type and setting."""
        return f"{self.kind} {self.setting}".strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTable:
    """The rows by their parameters, and what follows from them. `failed`: sentences on trainings without a result."""

    metrics: tuple[Metric, ...]
    lines: tuple[Line, ...]
    reason: str
    failed: tuple[str, ...]


def table_of(results: Results, metrics: Sequence[Metric]) -> AdapterTable:
    """Compute the table of one study's results; rows lack until they have fresh seeds and costs."""
    runs: dict[str, list[Run]] = {}
    for run in results.runs:
        runs.setdefault(run.architecture, []).append(run)
    found = []
    for costs in sorted(results.costs, key=lambda costs: costs.costs["num_params"]):
        own = runs.get(costs.architecture, [])
        rate = best_rate(own, metrics[0])
        fresh = [run for run in own if run.learning_rate == rate and run.seed != TUNING_SEED and not run.failure]
        if fresh:
            found.append((costs, sorted(fresh, key=lambda run: run.seed)))
    scores = {metric.name: [_scores(fresh, metric) for _, fresh in found] for metric in metrics}
    spreads = {name: SeedSpread.of(columns) for name, columns in scores.items()}
    params = [costs.costs["num_params"] for costs, _ in found]
    quality = metrics[0]
    fronts = _fronts(scores[quality.name], params, spreads[quality.name])
    lines = []
    for i, ((costs, fresh), on_front) in enumerate(zip(found, fronts, strict=True)):
        estimates = {
            m.name: estimate(scores[m.name][i], spread=spreads[m.name]).signed(1.0 if m.maximise else -1.0)
            for m in metrics
        }
        lines.append(_line(costs, fresh, estimates, on_front))
    contenders = [Contender(trial=i, scores=own, costs=(params[i],)) for i, own in enumerate(scores[quality.name])]
    reason = ""
    if contenders:
        margin = quality.default_margin(max(float(own.mean()) for own in scores[quality.name]))
        recommended = recommend(contenders, margin=margin, spread=spreads[quality.name])
        reason = recommended.reason(lambda i: lines[i].name, quality)
    failed = [f"{f'{r.kind} {r.setting}'.strip()} at {r.learning_rate:g}, seed {r.seed}: {r.failure}"
              for r in results.runs if r.failure]  # fmt: skip
    return AdapterTable(metrics=tuple(metrics), lines=tuple(lines), reason=reason, failed=tuple(failed))


def _scores(runs: Sequence[Run], metric: Metric) -> Floats:
    """Return the scores [seeds, rows] of the test rows, larger is better."""
    found: Floats = (1.0 if metric.maximise else -1.0) * np.array([run.test[metric.name] for run in runs], dtype=float)
    return found


def _fronts(scores: Sequence[Floats], params: Sequence[float], spread: SeedSpread | None) -> list[OnFront]:
    means = [float(own.mean()) for own in scores]
    members = non_dominated(np.column_stack([np.negative(means), params]))

    def on_front(i: int) -> OnFront:
        if members[i]:
            return "yes"
        rivals = [j for j in range(len(means)) if j != i and params[j] <= params[i] and means[j] >= means[i]]
        shown = any(paired_difference(scores[j], scores[i], spread=spread).low > 0 for j in rivals)
        return "no" if shown else "open"

    return [on_front(i) for i in range(len(means))]


def _line(costs: RowCosts, fresh: Sequence[Run], estimates: Mapping[str, Estimate], on_front: OnFront) -> Line:
    return Line(
        kind=costs.kind,
        size=costs.size,
        setting=costs.setting,
        num_params=costs.costs["num_params"],
        stored_bytes=costs.costs["stored_bytes"],
        learning_rate=fresh[0].learning_rate,
        seeds=tuple(run.seed for run in fresh),
        estimates=estimates,
        step=costs.costs["step_s"] / costs.lora["step_s"],
        memory=costs.costs["peak_memory_bytes"] / costs.lora["peak_memory_bytes"],
        on_front=on_front,
    )


def to_dict(found: AdapterTable) -> dict[str, Any]:
    """Return the table as plain data for JSON."""
    return {"rows": [asdict(line) for line in found.lines], "recommended": found.reason, "failed": list(found.failed)}


def to_markdown(found: AdapterTable) -> str:
    """Return the table with what follows from it, as Markdown."""
    if not found.lines:
        return f"{NOT_MEASURED}\n"
    head = [
        *("type", "setting", "parameters", "stored kB", *(f"{metric.name} (95 %)" for metric in found.metrics)),
        *("step", "memory", "rate", "front"),
    ]
    rows = [_cells(line, found.metrics) for line in found.lines]
    parts = [table([head, *rows], right=range(2, len(head) - 1)), found.reason]
    # A type has several rows: it has no place on the front if none of them may have one.
    verdicts: dict[str, set[OnFront]] = {}
    for line in found.lines:
        verdicts.setdefault(line.kind, set()).add(line.on_front)
    beaten = [f"`{kind}`" for kind, own in verdicts.items() if own == {"no"}]
    if beaten:
        parts.append(f"No place on the front, in either setting: {', '.join(beaten)}.")
    if found.failed:
        parts.append(f"Trainings without a result: {'; '.join(found.failed)}.")
    return "\n\n".join(parts) + "\n"


def _cells(line: Line, metrics: Sequence[Metric]) -> list[str]:
    edge = " (edge)" if line.learning_rate in (RATES[0], RATES[-1]) else ""
    return [
        f"`{line.kind}`",
        line.setting,
        f"{line.num_params:,.0f}",
        f"{line.stored_bytes / 1000:,.1f}",
        *(_quality(line.estimates[metric.name], metric) for metric in metrics),
        f"{line.step:.2f}",
        f"{line.memory:.2f}",
        f"{line.learning_rate:g}{edge}",
        line.on_front,
    ]


def _quality(found: Estimate, metric: Metric) -> str:
    factor, digits = (100, ".1f") if metric.unit == "share" else (1, ".3f")
    value, low, high = (f"{factor * number:{digits}}" for number in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})"


def section(results: Results) -> str:
    """Return the section of the page: a table for each part that was measured."""
    parts = []
    for name, part in PARTS.items():
        settings = load_study(part.study)
        own = results.of(settings.study)
        if own.runs:
            parts.append(f"### {TITLES[name]}\n\n{to_markdown(table_of(own, metrics_of(settings))).rstrip()}")
    return "\n\n".join(parts) or NOT_MEASURED


def write(results: Results, page: Path = PAGE) -> None:
    """Write the section into the page. Raises OSError, and ValueError without the marks."""
    text = page.read_text(encoding="utf-8")
    atomic_write_text(page, with_section(text, BEGIN, END, section(results)))
