"""Metrics of quality by name; add a new one here. Costs are in `problem.py`. Nothing here imports torch."""

from __future__ import annotations

from autopeft.search_space.metrics.base import Columns, Metric, MetricError, OverSet, PerExample, Quality
from autopeft.search_space.metrics.macro_f1 import MacroF1
from autopeft.search_space.metrics.matthews import Matthews
from autopeft.search_space.metrics.mean import ACCURACY, LOSS
from autopeft.search_space.metrics.own import Own, place_of
from autopeft.search_space.registry import Registry

QUALITIES: Registry[Quality] = Registry(
    "autopeft.metrics", Quality, "name", (ACCURACY, LOSS, MacroF1(), Matthews()), instances=True
)
#: What every evaluation reports; the order is that of its values.
ALWAYS: tuple[Quality, ...] = (LOSS, ACCURACY)

__all__ = [
    "ALWAYS",
    "QUALITIES",
    "Columns",
    "Metric",
    "MetricError",
    "OverSet",
    "Own",
    "PerExample",
    "Quality",
    "place_of",
]
