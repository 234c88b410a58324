"""Checks of an exporter: what it says of a recipe, and what it writes."""

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
    assert (fit.level == "exact") == (not fit.lost), f"{name}: {fit.level}, and it loses {list(fit.lost)}"
    target = folder / "out"
    if fit.level == "unsupported":
        assert _refused(exporter, recipe, state, target), f"{name}: writes what it says that it cannot hold"
        return
    if fit.level == "approximate":
        assert _refused(exporter, recipe, state, target), f"{name}: loses something without being allowed to"
    if exporter.needs_state:
        assert _refused(exporter, recipe, None, target, allow_lossy=True), f"{name}: needs weights, and writes without"
    assert not list(folder.iterdir()), f"{name}: what is refused leaves something behind"
    assert exporter.export(recipe, state, target, allow_lossy=True) == fit, f"{name}: export and assess differ"
    assert [path.name for path in folder.iterdir()] == ["out"], f"{name}: writes beside its folder"
    written = sorted(path.name for path in target.iterdir())
    assert len(written) > 1, f"{name}: writes nothing but the recipe"
    assert Recipe.load(target / RECIPE_FILE) == recipe, f"{name}: the recipe beside the export is another"
    assert _refused(exporter, recipe, state, target, allow_lossy=True), f"{name}: replaces an export unforced"
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
