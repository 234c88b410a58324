"""Metrics of quality by name; add a new one here. Costs are in `problem.py`. Nothing here imports torch."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from typing_extensions import override

from autopeft.search_space.metrics.base import Columns, Metric, MetricError, OnOwnRows, OverSet, PerExample, Quality
from autopeft.search_space.metrics.by_domain import SEPARATOR, WORST, ByDomain
from autopeft.search_space.metrics.calibration import BRIER_SCORE, CalibrationError
from autopeft.search_space.metrics.forgetting import FORGETTING
from autopeft.search_space.metrics.lm_eval import LmEval
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
    *(ACCURACY, LOSS, FORGETTING, MacroF1(), Matthews(), BRIER_SCORE, CalibrationError()),
    *(ExactMatch(), RougeL(), Chrf(), Bleu(), RegexMatch(), PassAt1()),
)
QUALITIES: Registry[Quality] = Registry("autopeft.metrics", Quality, "name", _OWN, instances=True)
#: What every evaluation reports; the order is that of its values.
ALWAYS: tuple[Quality, ...] = (LOSS, ACCURACY)


class MetricsByName(Mapping[str, Metric]):
    """Metrics by name; whoever has the name of a metric, asks here.

    `name@domain` is the quality `name` over the rows of a domain, and `name@worst` over those of the worst one. An
    iteration has the names without domains alone.
    """

    def __init__(self, *metrics: Mapping[str, Metric]) -> None:
        """`metrics`: those of the first mapping come last in an iteration, and first where a name is in several."""
        found: list[Any] = list(metrics)
        self._metrics: Mapping[str, Metric] = ChainMap(*found)

    def with_own(self, own: Mapping[str, Metric], pattern: str | None = None) -> MetricsByName:
        """Return these metrics and a study's `own`, with the pattern that `RegexMatch` reads."""
        matching = RegexMatch().with_pattern(pattern or "")
        return MetricsByName({**own, **({} if pattern is None else {matching.name: matching})}, self._metrics)

    @override
    def __getitem__(self, name: str) -> Metric:
        if name in self._metrics:
            return self._metrics[name]
        metric, separator, domain = name.partition(SEPARATOR)
        found = self._metrics.get(metric)
        # Rows of the task have the domains.
        if not separator or not domain or not isinstance(found, Quality) or isinstance(found, OnOwnRows):
            raise KeyError(name)
        return ByDomain.over(found, domain)

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    @override
    def __len__(self) -> int:
        return len(self._metrics)

    def qualities(self, names: Iterable[str]) -> list[Quality]:
        """Return the qualities among metrics of these names; unknown names and costs are left out."""
        return [metric for metric in map(self.get, names) if isinstance(metric, Quality)]


__all__ = [
    "ALWAYS",
    "FORGETTING",
    "LOSS",
    "QUALITIES",
    "SEPARATOR",
    "WORST",
    "ByDomain",
    "Columns",
    "LmEval",
    "Metric",
    "MetricError",
    "MetricsByName",
    "OfTexts",
    "OnOwnRows",
    "OverSet",
    "Own",
    "OwnOfTexts",
    "PassAt1",
    "PerExample",
    "Quality",
    "RegexMatch",
    "UserDefined",
    "place_of",
    "user_defined",
]
