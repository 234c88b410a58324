"""Checks of an exporter: its assessment of a recipe, and its files."""

from __future__ import annotations

from pathlib import Path

from autopeft.studies.exporters import Exporter, ExportError
from autopeft.studies.exporters.base import RECIPE_FILE, State
from autopeft.studies.recipes.recipe import Recipe


def check_exporter(exporter: Exporter, recipe: Recipe, state: State, folder: Path) -> None:
    """Check an exporter with a recipe and its trained weights; it writes below `folder`, which must be empty.

    Raises AssertionError, which names the first claim that fails.
    """
    name = exporter.name
    assert name, "an exporter needs a name"
    assert exporter.summary, f"{name}: an exporter needs a summary"
    fit = exporter.assess(recipe)
    assert (fit.level == "exact") == (not fit.lost), (
        f"{name}: the level is {fit.level}, but the losses are {list(fit.lost)}"
    )
    target = folder / "out"
    if fit.level == "unsupported":
        assert _refused(exporter, recipe, state, target), f"{name}: exports a recipe that it declares unsupported"
        return
    if fit.level == "approximate":
        assert _refused(exporter, recipe, state, target), f"{name}: exports with losses without allow_lossy"
    if exporter.needs_state:
        assert _refused(exporter, recipe, None, target, allow_lossy=True), (
            f"{name}: needs weights, but exports without them"
        )
    assert not list(folder.iterdir()), f"{name}: a refused export leaves files"
    assert exporter.export(recipe, state, target, allow_lossy=True) == fit, (
        f"{name}: export and assess return different assessments"
    )
    assert [path.name for path in folder.iterdir()] == ["out"], f"{name}: writes outside its folder"
    written = sorted(path.name for path in target.iterdir())
    assert len(written) > 1, f"{name}: writes nothing but the recipe"
    assert Recipe.load(target / RECIPE_FILE) == recipe, f"{name}: the exported recipe differs"
    assert _refused(exporter, recipe, state, target, allow_lossy=True), f"{name}: replaces an export without force"
    exporter.export(recipe, state, target, allow_lossy=True, force=True)
    assert sorted(path.name for path in target.iterdir()) == written, f"{name}: writes other files the second time"


def _refused(
    exporter: Exporter, recipe: Recipe, state: State | None, target: Path, *, allow_lossy: bool = False
) -> bool:
    try:
        exporter.export(recipe, state, target, allow_lossy=allow_lossy)
    except ExportError:
        return True
    return False
