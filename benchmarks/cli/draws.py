"""`draws`: one study with several search seeds."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from autopeft.benchmarks.cli.shared import print_result
from autopeft.studies.cli.options import JsonOption, SetOption, numbers_of
from autopeft.studies.errors import ConfigurationError

DEMO = Path(str(files("autopeft.studies.examples") / "demo.yaml"))


def draws(
    study: Annotated[Path, typer.Argument(help="Study file, or a folder with a study.yaml.")] = DEMO,
    set_: SetOption = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds of the studies, separated by commas.")] = "0,1,2,3,4",
    baseline: Annotated[str, typer.Option("--baseline", help="Baseline to compare with.")] = "lora-r8-qv",
    output: Annotated[
        Path, typer.Option("--output", help="Folder of the studies; ended ones in it are not run again.")
    ] = Path("runs/draws"),
    as_json: JsonOption = False,
) -> None:
    """Run a study with several seeds, and compare what each recommends with a tuned baseline."""
    from autopeft.benchmarks import draws as several
    from autopeft.studies.cli.progress import ProgressView
    from autopeft.studies.config.loading import load_study

    first = load_study(study, set_ or ())
    if baseline not in first.baselines.names:
        raise ConfigurationError(f"--baseline {baseline}: the study has {', '.join(first.baselines.names) or 'none'}")
    snapshots, found = [], []
    for seed in numbers_of("--seeds", seeds):
        words = [f"seed={seed}", f"output={output.absolute() / str(seed)}", "tracking.enabled=false"]
        settings = load_study(study, [*(set_ or ()), *words])
        with ProgressView() as view:
            snapshots.append(several.ended(settings, view))
        found.append(several.draw(snapshots[-1], seed, baseline))
    metric = snapshots[0].metrics[snapshots[0].quality]
    print_result(as_json, lambda: several.to_dict(found), lambda: several.to_markdown(found, metric, baseline))
