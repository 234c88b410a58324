"""Results of the benchmark as data and as Markdown: ratios, with the times that they are computed from."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from autopeft.benchmarks.speed.arms import Bench, EqualWork
from autopeft.benchmarks.speed.kernels import KernelRow
from autopeft.benchmarks.speed.overhead import Overhead
from autopeft.benchmarks.speed.ranking import WANTED, Agreement, Budget, Correlation
from autopeft.evaluators.costs.timing import Spread
from autopeft.studies.reports import markdown
from autopeft.studies.versions import versions_of

PACKAGES = ("torch", "transformers", "peft", "optuna", "triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class HourRow:
    """An arm's candidates per hour over those of the loop, with and without a pruner, and how well it ranks them.

    `steps_share`: its training steps, as a share of all.
    """

    arm: str
    over_loop: Spread
    over_pruned_loop: Spread
    steps_share: float
    agreement: Agreement


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyRanking:
    """How early candidates can be ranked.

    `ceiling`: agreement of full trainings with two seeds. `reached`: whether the matched share ranks the top half well
    enough; otherwise it is the best one.
    """

    candidates: int
    ceiling: Agreement
    budgets: tuple[Budget, ...]
    matched_share: float
    reached: bool
    rows: tuple[HourRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedResult:
    """All results of the benchmark; see the classes of the fields."""

    conditions: dict[str, Any]
    equal_work: tuple[EqualWork, ...]
    overhead: Overhead
    kernels: tuple[KernelRow, ...]
    ranking: EarlyRanking | None

    def to_dict(self) -> dict[str, Any]:
        """Return the results as data."""
        return asdict(self)


def conditions(bench: Bench, **options: int) -> dict[str, Any]:
    """Return the conditions of a benchmark: study, options, model, machine and versions."""
    settings, single = bench.settings, bench.single
    gpu = bench.device.type == "cuda"
    return {
        "study": settings.study,
        "seed": settings.seed,
        **options,
        "model": settings.model.id,
        "dtype": settings.model.dtype,
        "train_rows": len(single.examples["train"]),
        "validation_rows": len(single.examples["validation"]),
        "device": torch.cuda.get_device_name(bench.device) if gpu else "cpu",
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # of other processes: the benchmark has not started
        "versions": {"python": platform.python_version(), **versions_of(PACKAGES)},
    }


def _cpu() -> str:
    """Return the name of the processor, or its architecture where the system does not name it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# Markdown


def to_markdown(result: SpeedResult) -> str:
    """Return the results as a section."""
    parts = [_conditions(result.conditions), _equal_work(result.equal_work), _overhead(result.overhead)]
    parts.append(_kernels(result.kernels))
    if result.ranking is not None:
        parts += [_budgets(result.ranking), _hours(result.ranking)]
    return "\n\n".join(parts) + "\n"


def _conditions(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in found["versions"].items())
    machine = found["cpu"] if found["device"] == "cpu" else f"{found['device']}, {found['cpu']}"
    return (
        f"Study `{found['study']}`, seed {found['seed']}: {found['model']} ({found['dtype']}), {found['train_rows']:,}"
        f" training and {found['validation_rows']:,} validation rows; {found['candidates']} candidates; medians over"
        f" the rounds ({found['rounds']}), lowest to highest in brackets.\n"
        f"{machine}, {found['threads']} threads of {found['cores']} cores, load {found['load']}; {versions}."
    )


def _equal_work(tables: Sequence[EqualWork]) -> str:
    arms = [row.arm for row in tables[0].rows]
    lines = [["Equal work: time of the loop over that of", *arms, "loop, s per candidate"]]
    for table in tables:
        seconds = next(row.seconds for row in table.rows if row.arm == "loop")
        speedups = [_spread(row.speedup) for row in table.rows]
        lines.append([f"{table.title} ({table.steps} steps)", *speedups, f"{seconds:.3g}"])
    text = markdown.table(lines)
    if tables[0].rows[0].peak_memory_bytes is None:
        return text
    lines = [["Peak memory, GB", *arms]]
    lines += [[table.title, *(f"{(row.peak_memory_bytes or 0) / 1e9:.2f}" for row in table.rows)] for table in tables]
    return f"{text}\n\n{markdown.table(lines)}"


def _overhead(found: Overhead) -> str:
    return (
        f"A packed step of {found.slots} candidates of rank {found.rank} ({found.tokens:,} tokens) takes"
        f" {_spread(found.rho)} times the forward and backward pass of the bare backbone,"
        f" which takes {found.bare_s:.2f} s."
    )


def _kernels(rows: Sequence[KernelRow]) -> str:
    head = ["Kernel, forward and backward: time over its", "shape", "reference"]
    on_gpu = any(row.over_pytorch is not None for row in rows)
    lines = [[*head, *(["PyTorch"] if on_gpu else [])]]
    for row in rows:
        line = [row.kernel, row.shape, _spread(row.over_reference)]
        if on_gpu:
            line.append("-" if row.over_pytorch is None else _spread(row.over_pytorch))
        lines.append(line)
    return markdown.table(lines)


def _budgets(found: EarlyRanking) -> str:
    lines = [[f"Loss at a share of the steps against full training, {found.candidates} candidates", "all", "top half"]]
    lines += [[f"{budget.share:.0%}", *_agreement(budget.agreement)] for budget in found.budgets]
    lines.append(["full training with another seed", *_agreement(found.ceiling)])
    if found.reached:
        verdict = f"The top half is ranked as well as wanted ({WANTED}) from {found.matched_share:.0%} of the steps on."
    else:
        verdict = f"No share ranks the top half as well as wanted ({WANTED}); {found.matched_share:.0%} does best."
    return f"{markdown.table(lines)}\n\nSpearman, with 95 % intervals over the candidates. {verdict}"


def _hours(found: EarlyRanking) -> str:
    head = ["Candidates per hour, over those of", "the loop", "the loop with Hyperband", "steps", "all", "top half"]
    lines = [head]
    for row in found.rows:
        speedups = _spread(row.over_loop), _spread(row.over_pruned_loop)
        lines.append([row.arm, *speedups, f"{row.steps_share:.0%}", *_agreement(row.agreement)])
    return (
        f"{markdown.table(lines)}\n\nThe loop with Hyperband is not trained again: what it spends follows from the"
        " recorded losses and the loop's own times of steps and scorings. The last columns are Spearman's between an"
        " arm's own ranking and the true one."
    )


def _spread(found: Spread) -> str:
    if found.low == found.high:
        return f"{found.median:.2f}"
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def _agreement(found: Agreement) -> list[str]:
    return [_correlation(found.all), _correlation(found.top_half)]


def _correlation(found: Correlation) -> str:
    return "-" if found.value is None else f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
