"""What MLflow is told of a study: the params, metrics and tags of its runs, and a note on how to read them."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Sequence
from importlib import metadata
from statistics import fmean
from typing import TYPE_CHECKING, Any

from autopeft.search_space.architecture import digest
from autopeft.search_space.problem import SEARCH, Measurement, Trial
from autopeft.search_space.spaces.genes import TRAINING
from autopeft.studies.analysis.mixture_verdicts import verdicts
from autopeft.studies.analysis.pareto import FrontRow
from autopeft.studies.analysis.snapshot import Snapshot, summary

if TYPE_CHECKING:
    from mlflow.entities import Metric

# What MLflow accepts.
MAX_PARAM, MAX_TAG, MAX_NAME = 6000, 8000, 250

STUDY_ROLE = "study"
FRONT_FILTER = "tags.`autopeft.pareto` = 'true'"


def now_ms() -> int:
    return round(1000 * time.time())


def metric(name: str, value: float, at_ms: int, step: int = 0) -> Metric:
    from mlflow.entities import Metric

    return Metric(_name(name), float(value), at_ms, step)


def run_name(trial: Trial, snapshot: Snapshot) -> str:
    """``trial 7: lora 8 at attn.q attn.v, lr 0.002``"""
    who = f"trial {trial.number}"
    if trial.of is not None:
        who += f" (trial {trial.of}, seed {trial.seed})"
    elif trial.role != SEARCH:
        who += f" ({str(trial.role).replace(':', ' ')})"
    return _cut(f"{who}: {summary(trial, snapshot.backbone)}", MAX_NAME)


def trial_params(trial: Trial, snapshot: Snapshot) -> dict[str, str]:
    """Every searched gene by its name, every training field, and the architecture in words."""
    architecture = trial.candidate.architecture
    values = {
        "architecture": summary(trial, snapshot.backbone),
        "kinds": ", ".join(architecture.kinds) or "none",
        "role": str(trial.role),
        "seed": trial.seed,
        **trial.genes,
        **{TRAINING + name: value for name, value in trial.candidate.training.items()},
    }
    return {_name(name): _cut(text(value), MAX_PARAM) for name, value in values.items()}


def trial_metrics(trial: Trial, snapshot: Snapshot, start_ms: int) -> list[Metric]:
    """All that was measured, with its errors and spreads; the loss of each step; the rungs by their step.

    Times count from `start_ms`, so that the same trial always gives the same points.
    """
    found = trial.measurement
    if found is None:
        return []
    prefixes = {objective.name: "obj" for objective in snapshot.objectives}
    values = {"time/wall_s": found.wall_s, "time/train_s": found.train_s}
    if trial.state != "pruned":  # the values of a rung do not belong beside those of a full training
        for suffix, numbers in (("", found.values), ("_std_err", found.std_err), ("_iqr", found.spread)):
            for name, value in numbers.items():
                values[f"{prefixes.get(name, 'metric')}/{name}{suffix}"] = value
    values |= {f"test/{name}": value for name, value in found.test.items()}
    values |= {f"routing/{name}": value for name, value in _routing(found).items()}
    end_ms = start_ms + round(1000 * found.wall_s)
    points = [metric(name, value, end_ms) for name, value in values.items()]

    num_steps = len(found.losses)

    def reached_ms(part: float) -> int:
        return start_ms + round(1000 * found.train_s * part)

    for step, loss in enumerate(found.losses, start=1):
        points.append(metric("train/loss", loss, reached_ms(step / num_steps), step))
    for share, rung in found.rungs:
        # In percent where the steps are not known.
        part = share / found.share
        step = round(part * (num_steps or 100))
        points += [metric(f"rung/{name}", value, reached_ms(part), step) for name, value in rung.items()]
    return points


def _routing(found: Measurement) -> dict[str, float]:
    """Means over the sites with experts; what each of them did is in `routing.json`."""
    routes = found.routes.values()
    if not routes:
        return {}
    return {
        "busiest_expert_share": fmean(max(route["load"]) for route in routes),
        "entropy": fmean(route["entropy"][0] for route in routes),
        "experts_per_token": fmean(route["active"][0] for route in routes),
    }


def study_tags(snapshot: Snapshot) -> dict[str, str]:
    """What every run of a study carries."""
    return {"autopeft.study": snapshot.study, "autopeft.study_id": snapshot.study_id}


def trial_tags(trial: Trial, snapshot: Snapshot, row: FrontRow | None) -> dict[str, str]:
    """`row`: the candidate as the front's reports show it, if they do."""
    tags = {
        **study_tags(snapshot),
        "autopeft.trial": text(trial.number),
        "autopeft.key": trial.candidate.key,
        "autopeft.state": trial.state,
        "autopeft.role": str(trial.role),
        "autopeft.pareto": text(row is not None and row.on_front),
        "autopeft.recommended": text(row is not None and row.recommended),
    }
    if trial.of is not None:
        tags["autopeft.of"] = text(trial.of)
    if trial.error:
        tags["autopeft.error"] = _cut(trial.error, MAX_TAG)
    return tags


def front_view(snapshot: Snapshot) -> tuple[str, str]:
    """Key and contents of a view of MLflow's UI, such as its Share button makes: the front with its objectives."""
    key = digest(["front", snapshot.study_id, [objective.name for objective in snapshot.objectives]])
    metrics = [f"obj/{objective.name}" for objective in snapshot.objectives] + [f"obj/{snapshot.quality}_std_err"]
    state = {
        "searchFilter": f"{FRONT_FILTER} and tags.`autopeft.study_id` = '{snapshot.study_id}'",
        # Sorted by date, the UI folds the runs into their parent.
        "orderByKey": f"metrics.`{metrics[0]}`",
        "orderByAsc": not snapshot.objectives[0].maximise,
        "selectedColumns": [f"metrics.`{name}`" for name in metrics] + ["tags.`autopeft.recommended`"],
    }
    return key, json.dumps(state)


def note(snapshot: Snapshot, rows: Sequence[FrontRow], experiment_id: str) -> str:
    """The description of the study's run, in Markdown."""
    key, _ = front_view(snapshot)
    front = f"#/experiments/{experiment_id}/runs?viewStateShareKey={key}&workflowType=machine_learning"
    lines = [
        f"The runs below this one are the evaluations of the study **{snapshot.study}**.",
        "",
        f"[Show the Pareto front alone]({front}), or paste this into the search box of the experiment",
        "and sort by a metric (sorted by date, runs are folded into this one):",
        "",
        f"    {FRONT_FILTER}",
        "",
        "Charts show ten runs unless told otherwise. The front with its error bars is among the artifacts of this run,",
        "in `pareto/front.html`.",
        "",
    ]
    for row in rows:
        if row.recommended:
            values = ", ".join(f"{o.name} {_number(row, o.name)}" for o in snapshot.objectives)
            lines += [f"Recommended: **{row.label}**, {row.summary}: {values}.", ""]
    for verdict in verdicts(snapshot):
        lines += [*(f"    {line}" for line in verdict.lines(snapshot.metrics[snapshot.quality])), ""]
    lines += ["| column | meaning |", "|---|---|"]
    for objective in snapshot.objectives:
        better = "higher" if objective.maximise else "lower"
        about = f"{objective.metric.summary}; {objective.unit + ', ' if objective.unit else ''}{better} is better"
        lines.append(f"| `obj/{objective.name}` | {about} |")
    lines += [
        "| `obj/..._std_err`, `..._iqr` | standard error, interquartile range |",
        "| `metric/...` | what was measured besides |",
        "| `test/...` | on the test split: finalists only |",
        "| `train/loss`, `rung/...` | on the way, by step |",
        "| `routing/...` | of mixtures, means over their sites; each of them in the run's `routing.json` |",
        "| `hypervolume` | dominated by the search's trials up to this one, the step; corner as in the picture |",
        "| `hypervolume_so_far` | the same, up to the corner known at the time: compare no two points |",
        "| `surrogate/rank_correlation/...` | of the searcher's model with trials left out, if it has one |",
        "| `autopeft.pareto` | on the front (true, false) |",
        "| `autopeft.recommended` | the cheapest that the best cannot be told from |",
        "| `autopeft.role` | search, baseline:..., finalist: `autopeft.of` trained with another seed, or control:...: "
        "something plainer in place of its mixtures |",
    ]
    return _cut("\n".join(lines), MAX_TAG)


def environment() -> dict[str, Any]:
    """What results may depend on. No paths and no names of hosts: it is made to be shared."""
    import torch

    packages = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def text(value: Any) -> str:
    """As people read it; the exact numbers are in `architecture.json`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(row: FrontRow, name: str) -> str:
    error = row.std_err.get(name)
    return f"{row.values[name]:.6g}" + (f" ± {error:.2g}" if error else "")


def _name(name: str) -> str:
    """MLflow takes letters, digits and ``_ - .`` and blanks, and reads the whole as a path."""
    parts = (re.sub(r"[^\w. -]", "_", part).strip(".") or "_" for part in name.split("/"))
    return "/".join(parts)[:MAX_NAME]


def _cut(words: str, limit: int) -> str:
    return words if len(words) <= limit else words[: limit - 1] + "…"
