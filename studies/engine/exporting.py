"""Exports of complete trials to folders in the formats of other tools."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from autopeft.search_space.spelling import did_you_mean
from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.plan import weights_path
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.exporters import EXPORTERS, Assessment
from autopeft.studies.recipes.build import recipe_of
from autopeft.studies.storage.ledger import Ledger


def export_trial(
    settings: StudyFile,
    ledger: Ledger,
    snapshot: Snapshot,
    number: int,
    target: str,
    folder: Path | None = None,
    *,
    allow_lossy: bool = False,
    force: bool = False,
) -> tuple[Path, Assessment]:
    """Write trial `number` with its weights and its recipe; return the folder and the format's assessment.

    The default folder is inside the output folder. Raises ConfigurationError for an unknown target, and ExportError.
    """
    if target not in EXPORTERS:
        raise ConfigurationError(f"{target}: unknown format{did_you_mean(target, EXPORTERS)}")
    recipe = recipe_of(settings, ledger, snapshot, number)
    weights = weights_path(settings.output_folder, number)
    state = load_file(weights) if weights.is_file() else None
    folder = folder or settings.output_folder / "exports" / f"trial-{number}-{target}"
    return folder, EXPORTERS[target].export(recipe, state, folder, allow_lossy=allow_lossy, force=force)
