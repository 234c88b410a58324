"""The data that MLflow gets of a study: params, metrics and tags of its runs, and a note on how to read them."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Iterable
from importlib import metadata
from math import nan
from statistics import fmean
from typing import TYPE_CHECKING, Any

from autopeft.search_space.architecture import digest
from autopeft.search_space.metrics import SEPARATOR
from autopeft.search_space.problem import SEARCH, Measurement, Trial
from autopeft.search_space.spaces.genes import TRAINING
from autopeft.studies.analysis.front import Front, FrontRow
from autopeft.studies.analysis.gains import gains, other_qualities
from autopeft.studies.analysis.mixture_verdicts import verdicts
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.analysis.summary import summary

if TYPE_CHECKING:
    from mlflow.entities import Metric

# Limits of MLflow, in characters.
MAX_PARAM, MAX_TAG, MAX_NAME = 6000, 8000, 250

STUDY_ROLE = "study"
#: The first part of the names of metrics that only members of the front have.
FRONT = "front/"
FRONT_FILTER = "tags.`autopeft.pareto` = 'true'"


def now_ms() -> int:
    """Return the current time as MLflow counts it, in milliseconds since 1970."""
    return round(1000 * time.time())


def metric(name: str, value: float, at_ms: int, step: int = 0) -> Metric:
    """Return a point of an MLflow metric, under a name that MLflow accepts."""
    from mlflow.entities import Metric

    return Metric(accepted_name(name), float(value), at_ms, step)


def run_name(trial: Trial, snapshot: Snapshot) -> str:
    """Return the name of a trial's run, such as "trial 7: lora 8 at attn.q attn.v, lr 0.002"."""
    who = f"trial {trial.number}"
    if trial.of is not None:
        who += f" (trial {trial.of}, seed {trial.seed})"
    elif trial.role != SEARCH:
        who += f" ({str(trial.role).replace(':', ' ')})"
    return _cut(f"{who}: {summary(trial, snapshot.backbone)}", MAX_NAME)


def trial_params(trial: Trial, snapshot: Snapshot) -> dict[str, str]:
    """Return every searched gene by its name, every training setting, and the architecture as text."""
    architecture = trial.candidate.architecture
    values = {
        "architecture": summary(trial, snapshot.backbone),
        "kinds": ", ".join(architecture.kinds) or "none",
        "role": str(trial.role),
        "seed": trial.seed,
        **trial.genes,
        **{TRAINING + name: value for name, value in trial.candidate.training.items()},
    }
    return {accepted_name(name): _cut(text(value), MAX_PARAM) for name, value in values.items()}


def trial_metrics(trial: Trial, snapshot: Snapshot, start_ms: int) -> list[Metric]:
    """Return all measurements with standard errors and interquartile ranges, losses by step, and rungs by step.

    Times count from `start_ms`, so the same trial always gives the same points.
    """
    found = trial.measurement
    if found is None:
        return []
    values = {"time/wall_s": found.wall_s, "time/train_s": found.train_s}
    if trial.state != "pruned":  # values at a rung are not comparable with those of a full training
        for suffix, numbers in (("", found.values), ("_std_err", found.std_err), ("_iqr", found.spread)):
            for name, value in numbers.items():
                values[f"{_prefix(name, snapshot)}/{name}{suffix}"] = value
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
        # Without known steps, the step is in per cent.
        part = share / found.share
        step = round(part * (num_steps or 100))
        points += [metric(f"rung/{name}", value, reached_ms(part), step) for name, value in rung.items()]
    return points


def _prefix(name: str, snapshot: Snapshot) -> str:
    """Return the first part of the names of a trial's values of a metric."""
    return "obj" if name in snapshot.objectives_by_name else "metric"


def _routing(found: Measurement) -> dict[str, float]:
    """Return means over the sites with experts; `routing.json` has the data of each site."""
    routes = found.routes.values()
    if not routes:
        return {}
    return {
        "busiest_expert_share": fmean(max(route["load"]) for route in routes),
        "entropy": fmean(route["entropy"][0] for route in routes),
        "experts_per_token": fmean(route["active"][0] for route in routes),
    }


def front_metrics(row: FrontRow | None, snapshot: Snapshot, known: Iterable[str]) -> dict[str, float]:
    """Return the numbers of a member of the front, as all reports have them: means over fresh seeds, not one run's.

    Those among the `known` metrics of its run that it no longer has are NaN, because MLflow deletes no metric.
    """
    numbers = row.numbers(snapshot.quality) if row is not None and row.on_front else {}
    gone = dict.fromkeys((name for name in known if name.startswith(FRONT)), nan)
    return gone | {accepted_name(FRONT + name): value for name, value in numbers.items()}


def study_tags(snapshot: Snapshot) -> dict[str, str]:
    """Return the tags that every run of a study has."""
    return {"autopeft.study": snapshot.study, "autopeft.study_id": snapshot.study_id}


def trial_tags(trial: Trial, snapshot: Snapshot, row: FrontRow | None) -> dict[str, str]:
    """Return the tags of a trial's run. `row`: the candidate in the reports of the front; None if it is in none."""
    tags = {
        **study_tags(snapshot),
        "autopeft.trial": text(trial.number),
        "autopeft.key": trial.candidate.key,
        "autopeft.state": trial.state,
        "autopeft.role": str(trial.role),
        "autopeft.pareto": text(row is not None and row.on_front),
        "autopeft.recommended": text(row is not None and row.recommended),
        "autopeft.standing": (row.standing if row is not None else None) or "none",
    }
    if trial.of is not None:
        tags["autopeft.of"] = text(trial.of)
    if trial.error:
        tags["autopeft.error"] = _cut(trial.error, MAX_TAG)
    return tags


def front_view(snapshot: Snapshot) -> tuple[str, str]:
    """Return key and content of a view of MLflow's UI, as its Share button makes one: the front and its objectives."""
    key = digest(["front", snapshot.study_id, [objective.name for objective in snapshot.objectives]])
    quality = snapshot.quality
    names = [objective.name for objective in snapshot.objectives]
    names += [f"{quality}_std_err", f"{quality}_difference", f"test_{quality}"]
    names += [reported.name for reported in snapshot.reported]
    metrics = [accepted_name(FRONT + name) for name in names]
    state = {
        "searchFilter": f"{FRONT_FILTER} and tags.`autopeft.study_id` = '{snapshot.study_id}'",
        # Sorted by date, the UI folds the runs into their parent.
        "orderByKey": f"metrics.`{metrics[0]}`",
        "orderByAsc": not snapshot.objectives[0].maximise,
        "selectedColumns": [f"metrics.`{name}`" for name in metrics]
        + ["tags.`autopeft.standing`", "tags.`autopeft.recommended`"],
    }
    return key, json.dumps(state)


def note(snapshot: Snapshot, front: Front, experiment_id: str) -> str:
    """Return the description of the study's run, in Markdown."""
    key, _ = front_view(snapshot)
    link = f"#/experiments/{experiment_id}/runs?viewStateShareKey={key}&workflowType=machine_learning"
    lines = [
        f"The child runs of this run are the evaluations of the study **{snapshot.study}**.",
        "",
        f"[Show only the Pareto front]({link}), or paste this filter into the search box of the experiment",
        "and sort by a metric (sorted by date, child runs are hidden under this one):",
        "",
        f"    {FRONT_FILTER}",
        "",
        "MLflow's charts show ten runs by default. The front with error bars is an artifact of this run:",
        "`pareto/front.html`.",
        "",
    ]
    for row in front.members:
        if row.recommended:
            values = ", ".join(f"{o.name} {_number(row, o.name)}" for o in snapshot.objectives)
            lines += [f"Recommended: **{row.label}**, {row.summary}: {values}. {front.reason}", ""]
    lines += [line for sentence in other_qualities(snapshot, front) for line in (sentence, "")]
    lines += [line for gain in gains(snapshot, front) for line in (gain.sentence, "")]
    if snapshot.nothing_learnt is not None:
        lines += [f"Nothing learnt: {snapshot.nothing_learnt}.", ""]
    for verdict in verdicts(snapshot):
        lines += [*(f"    {line}" for line in verdict.lines(snapshot.metrics[snapshot.quality])), ""]
    lines += ["| column | meaning |", "|---|---|"]
    for measure in snapshot.measures:
        better = "higher" if measure.maximise else "lower"
        about = f"{measure.metric.summary}; {measure.unit + ', ' if measure.unit else ''}{better} is better"
        about += "" if measure.bound is None else f"; worst acceptable value: {measure.bound:g}"
        lines.append(f"| `{accepted_name(f'{_prefix(measure.name, snapshot)}/{measure.name}')}` | {about} |")
    lines += [
        "| `obj/..._std_err`, `..._iqr` | standard error, interquartile range |",
        "| `front/...` | members of the front: means over their fresh seeds, difference to the best member and test"
        " score with 95 % intervals, as in the table and the page |",
        "| `metric/...` | measurements that are not objectives |",
        "| `test/...` | scores on the test split (finalists only) |",
        "| `train/loss`, `rung/...` | training loss, and validation scores at the rungs; the step is a training step |",
        "| `routing/...` | mixtures only: mean over the sites; `routing.json` of the run has every site |",
        "| `hypervolume` | dominated by the search's trials up to the step, a trial number; costs count by their "
        "logarithm; the picture names the reference point |",
        "| `hypervolume_so_far` | the same with the reference point of that moment; points are not comparable |",
        "| `surrogate/rank_correlation/...` | between the surrogate's predictions and values of held-out trials |",
        "| `autopeft.pareto` | whether the candidate is on the front (true, false) |",
        "| `autopeft.recommended` | the cheapest candidate that is shown to be within the margin of the best |",
        "| `autopeft.standing` | best; as good: shown to be within the margin; tied: not distinguished from the best;"
        " worse |",
        "| `autopeft.role` | search; baseline:...; finalist: trial `autopeft.of` trained with another seed; "
        "control:...: a matched baseline of the mixtures in trial `autopeft.of` |",
    ]
    return _cut("\n".join(lines), MAX_TAG)


def environment() -> dict[str, Any]:
    """Return versions and hardware that results may depend on; no paths and host names, as it may be published."""
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
    """Format a value for readers; the exact numbers are in `architecture.json`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(row: FrontRow, name: str) -> str:
    error = row.std_err.get(name)
    return f"{row.values[name]:.6g}" + (f" ± {error:.2g}" if error else "")


def accepted_name(name: str) -> str:
    """Return a name that MLflow accepts: letters, digits, `_ - .` and blanks, read as a path.

    `@` becomes `_at_`. Names of domains may have any signs; a digest keeps those apart that would become one.
    """
    words = name.replace(SEPARATOR, "_at_", 1)
    parts = (re.sub(r"[^\w. -]", "_", part).strip(".") or "_" for part in words.split("/"))
    found = "/".join(parts)
    if SEPARATOR in name and (found != words or len(found) > MAX_NAME):
        mark = f"-{digest(name)[:8]}"
        return found[: MAX_NAME - len(mark)] + mark
    return found[:MAX_NAME]


def _cut(long: str, limit: int) -> str:
    return long if len(long) <= limit else long[: limit - 1] + "…"
