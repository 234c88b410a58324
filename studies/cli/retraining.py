"""Commands that train from a recipe: `train` and `verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autopeft.studies.cli.options import JsonOption, print_json
from autopeft.studies.cli.streams import echo
from autopeft.studies.errors import UserError, cause, file_errors

if TYPE_CHECKING:
    from autopeft.studies.engine.retraining import Retrained
    from autopeft.studies.recipes.recipe import Recipe

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe.yaml.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-code", help="Allow the Python code of the recipe's custom metrics.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="Device: auto, cpu or cuda.")]


def train(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; default: `trained` beside the recipe.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Random seed; default: the recipe's.")] = None,
    device: DeviceOption = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run.")] = False,
    trust_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe from scratch; write the adapter and its test scores."""
    from autopeft.studies.engine.retraining import promises_met
    from autopeft.studies.engine.session import check_disk
    from autopeft.studies.exporters import EXPORTERS
    from autopeft.studies.exporters.base import check_folder
    from autopeft.studies.recipes.recipe import Recipe

    loaded = Recipe.load(recipe)
    folder = (out or recipe.parent / "trained").absolute()
    # Before the training, which would be lost.
    check_folder(folder, force)
    check_disk(folder.parent)
    run = _retrain(loaded, [loaded.seed if seed is None else seed], device, trust_code)[0]
    metrics = {"seed": run.seed, "test": run.test, "promised": _promised(loaded), "kept": promises_met(loaded, [run])}
    beside = {"metrics.json": json.dumps(metrics, indent=2) + "\n"}
    try:
        EXPORTERS["native"].export(loaded, run.outcome.weights, folder, force=force, beside=beside)
    except Exception as error:
        raise UserError(f"{cause(error)}\n{_rescued(run, folder)}") from error
    if as_json:
        print_json(metrics)
        return
    _print(loaded, [run])
    echo(f"adapter, recipe and metrics in {folder}")


def verify(
    recipe: RecipeArgument,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of new seeds.")] = 2,
    device: DeviceOption = "auto",
    trust_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe with new seeds; exit with 1 if the mean test score is worse than the promised interval."""
    from autopeft.studies.engine.retraining import fresh_seeds, promises, promises_met
    from autopeft.studies.recipes.recipe import Recipe

    loaded = Recipe.load(recipe)
    if not promises(loaded):
        raise UserError(f"{recipe}: has no promised interval: its study trained no candidate with more than one seed")
    runs = _retrain(loaded, fresh_seeds(loaded, seeds), device, trust_code)
    verdicts = promises_met(loaded, runs)
    if as_json:
        found = [{"seed": run.seed, "test": run.test} for run in runs]
        print_json({"kept": verdicts, "promised": _promised(loaded), "runs": found})
    else:
        _print(loaded, runs)
    if not all(verdicts.values()):
        raise UserError("the recipe performs worse than promised")
    echo("the recipe performs as promised", err=as_json)


def _rescued(run: Retrained, folder: Path) -> str:
    """Save the weights of a training whose export failed, and return a sentence about it."""
    from safetensors.torch import save_file

    from autopeft.evaluators.atomic import atomic_write

    scores = ", ".join(f"test {name} {value:.4f}" for name, value in run.test.items())
    path = folder.with_name(f"{folder.name}-weights.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file(dict(run.outcome.weights or {}), temporary)
    except Exception as error:
        return f"the training has ended ({scores}), but its weights cannot be saved: {path}: {cause(error)}"
    return f"the training has ended ({scores}); its weights are in {path}"


def _retrain(recipe: Recipe, seeds: list[int], device: str, trust_code: bool) -> list[Retrained]:
    from rich.console import Console
    from rich.progress import Progress

    from autopeft.studies.engine.retraining import retrain
    from autopeft.studies.engine.session import torch_device

    console = Console(stderr=True)
    with file_errors(), Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"training with seed {', '.join(map(str, seeds))}", total=None)
        return retrain(
            recipe,
            seeds,
            torch_device(device),
            lambda done, total: bar.update(task, completed=done, total=total),
            trust_code=trust_code,
        )


def _promised(recipe: Recipe) -> dict[str, list[float | None]]:
    from autopeft.studies.engine.retraining import promises

    return {name: [m.low, m.high] for name, m in promises(recipe).items()}


def _print(recipe: Recipe, runs: list[Retrained]) -> None:
    """Print a line per run, and the mean of the runs beside the promised interval."""
    from autopeft.studies.engine.retraining import promises_met

    for run in runs:
        echo(f"seed {run.seed}: " + ", ".join(f"test {name} {value:.4f}" for name, value in run.test.items()))
    verdicts = promises_met(recipe, runs)
    for name, (low, high) in _promised(recipe).items():
        mean = sum(run.test[name] for run in runs) / len(runs)
        verdict = "as promised" if verdicts[name] else "WORSE THAN PROMISED"
        echo(f"test {name}: mean {mean:.4f}, promised interval {low:.4f} to {high:.4f}: {verdict}")
