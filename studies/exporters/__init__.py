"""Exporters of recipes to the formats of other tools, one file each. A test compares the names with the CLI's help."""

from __future__ import annotations

from autopeft.search_space.registry import Registry
from autopeft.studies.exporters.axolotl import Axolotl
from autopeft.studies.exporters.base import Assessment, Exporter, ExportError
from autopeft.studies.exporters.merged import Merged
from autopeft.studies.exporters.native import Native
from autopeft.studies.exporters.peft_adapter import PeftAdapter, PeftPatterns
from autopeft.studies.exporters.trl_script import TrlScript

EXPORTERS: Registry[Exporter] = Registry(
    "autopeft.exporters",
    Exporter,
    "name",
    (Native(), PeftAdapter(), PeftPatterns(), TrlScript(), Axolotl(), Merged()),
    instances=True,
)

__all__ = ["EXPORTERS", "Assessment", "ExportError", "Exporter"]
