"""Metrics of quality by name; add a new one here. Costs are in `problem.py`. Nothing here imports torch."""

from __future__ import annotations

from autopeft.search_space.metrics.base import Columns, Metric, MetricError, OverSet, PerExample, Quality
from autopeft.search_space.metrics.macro_f1 import MacroF1
from autopeft.search_space.metrics.matthews import Matthews
from autopeft.search_space.metrics.mean import ACCURACY, LOSS
from autopeft.search_space.metrics.overlap import Bleu, Chrf, RougeL
from autopeft.search_space.metrics.own import Own, place_of
from autopeft.search_space.metrics.own_texts import OwnOfTexts, UserDefined, user_defined
from autopeft.search_space.metrics.programs import PassAt1
from autopeft.search_space.metrics.texts import ExactMatch, OfTexts, RegexMatch
from autopeft.search_space.registry import Registry

_OWN: tuple[Quality, ...] = (
    *(ACCURACY, LOSS, MacroF1(), Matthews()),
    *(ExactMatch(), RougeL(), Chrf(), Bleu(), RegexMatch(), PassAt1()),
)
QUALITIES: Registry[Quality] = Registry("autopeft.metrics", Quality, "name", _OWN, instances=True)
#: What every evaluation reports; the order is that of its values.
ALWAYS: tuple[Quality, ...] = (LOSS, ACCURACY)


def quality(name: str, pattern: str | None) -> Quality:
    """Return a registered metric as a study uses it. `pattern`: that of its texts. Raises KeyError."""
    found = QUALITIES[name]
    return found.with_pattern(pattern or "") if isinstance(found, RegexMatch) else found


__all__ = [
    "ALWAYS",
    "QUALITIES",
    "Columns",
    "Metric",
    "MetricError",
    "OfTexts",
    "OverSet",
    "Own",
    "OwnOfTexts",
    "PassAt1",
    "PerExample",
    "Quality",
    "RegexMatch",
    "UserDefined",
    "place_of",
    "quality",
    "user_defined",
]
