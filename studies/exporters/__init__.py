"""Recipes in the formats of other tools, one file each. `EXPORTERS` is what the CLI and the tables list."""

from __future__ import annotations

from autopeft.studies.exporters.axolotl import Axolotl
from autopeft.studies.exporters.base import Exporter, ExportError, Fit
from autopeft.studies.exporters.merged import Merged
from autopeft.studies.exporters.native import Native
from autopeft.studies.exporters.peft_adapter import PeftAdapter
from autopeft.studies.exporters.trl_script import TrlScript

EXPORTERS: dict[str, Exporter] = {
    exporter.name: exporter for exporter in (Native(), PeftAdapter(), TrlScript(), Axolotl(), Merged())
}

__all__ = ["EXPORTERS", "ExportError", "Exporter", "Fit"]
