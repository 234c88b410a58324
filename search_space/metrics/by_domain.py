"""Metrics over the rows of one domain, `accuracy@legal`, and over those of the worst domain, `accuracy@worst`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from autopeft.search_space.metrics.base import DOMAIN, Columns, MetricError, Quality, standard_error
from autopeft.search_space.metrics.forgetting import FORGETTING
from autopeft.search_space.spelling import did_you_mean

#: What separates the name of a metric from that of a domain.
SEPARATOR = "@"
#: The name in place of a domain's for the domain with the worst value.
WORST = "worst"
#: A standard error needs that many rows of a domain.
LEAST_ROWS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ByDomain(Quality):
    """A metric over a part of the rows. `whole_metric`: the same over all rows, of which it has unit and direction."""

    whole_metric: Quality
    digits: ClassVar[int] = 9

    @classmethod
    def over(cls, metric: Quality, domain: str) -> ByDomain:
        """Return the metric over a domain, or over the worst one."""
        kind, rows = (OfWorstDomain, "of the worst domain") if domain == WORST else (OfDomain, f"of domain {domain}")
        return kind(
            name=f"{metric.name}{SEPARATOR}{domain}",
            unit=metric.unit,
            maximise=metric.maximise,
            bound=metric.bound,
            worst=metric.worst,
            summary=f"{rows}: {metric.summary}",
            whole_metric=metric,
        )

    @property
    def domain(self) -> str:
        """The name of the domain, or `WORST`."""
        return self.name.removeprefix(self.whole_metric.name + SEPARATOR)

    @property
    @override
    def whole(self) -> Quality:
        return self.whole_metric

    @override
    def computable(self, columns: Collection[str]) -> bool:
        return DOMAIN in columns and self.whole_metric.computable(columns)

    @abstractmethod
    def problems(self, domains: Sequence[str], counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
        """Yield why rows do not suffice. `domains`: of the training rows. `counts`: by scored split, rows by domain."""

    def _too_few(self, domain: str, counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
        for split, rows in counts.items():
            if (count := rows.get(domain, 0)) < LEAST_ROWS:
                has = "one row" if count else "no row"
                yield (
                    f"{self.name}: the {split} split has {has} of the domain {domain!r}; a score needs two at least,"
                    " to have a standard error"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class OfDomain(ByDomain):
    """A metric over the rows of one domain. Its contributions are those of these rows alone, in their order."""

    @override
    def value(self, columns: Columns) -> float:
        return self.whole_metric.value(self._part(columns))

    @override
    def contributions(self, columns: Columns) -> Sequence[float]:
        return self.whole_metric.contributions(self._part(columns))

    def _part(self, columns: Columns) -> Columns:
        rows = _rows_by_domain(columns).get(self.domain)
        if rows is None:
            raise MetricError(f"{self.name} cannot be computed: no row has the domain {self.domain!r}")
        return _chosen(columns, rows)

    @override
    def problems(self, domains: Sequence[str], counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
        if self.domain not in domains:
            yield f"{self.name}: no row has the domain {self.domain!r}{did_you_mean(self.domain, domains)}"
        else:
            yield from self._too_few(self.domain, counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class OfWorstDomain(ByDomain):
    """A metric over the rows of the domain with the worst value, which may be another one for each candidate.

    Contributions are those of all N rows, so that candidates with different worst domains can be compared in pairs:
    with the contributions x[i] of the n rows of the worst domain and their mean, the value,

        contribution[i] = value + f (x[i] - value) in this domain, value elsewhere,  f^2 = N (N - 1) / (n (n - 1))

    They have the value as their mean and the standard error of the domain's value. It is the first-order expansion of
    the metric for the domain that is the worst one now. Where other domains are about as bad, the smallest of several
    noisy values is lower than the value of the truly worst domain.
    """

    @override
    def value(self, columns: Columns) -> float:
        return self._worst(columns)[1]

    @override
    def contributions(self, columns: Columns) -> Sequence[float]:
        rows, value = self._worst(columns)
        own = self.whole_metric.contributions(_chosen(columns, rows))
        total, n = len(columns[DOMAIN]), len(rows)
        factor = math.sqrt(total * (total - 1) / (n * (n - 1))) if n > 1 else 0.0
        found = [value] * total
        for row, x in zip(rows, own, strict=True):
            found[row] = value + factor * (x - value)
        return found

    def _worst(self, columns: Columns) -> tuple[Sequence[int], float]:
        """Return rows and value of the worst domain; among equals of the one whose value is the least sure."""
        parts = _rows_by_domain(columns)
        values = {domain: self.whole_metric.value(_chosen(columns, rows)) for domain, rows in parts.items()}
        worst = min(values.values()) if self.maximise else max(values.values())
        equals = [domain for domain, value in values.items() if value == worst]

        def sureness(domain: str) -> tuple[float, int]:
            # Without a spread, the fewest rows say the least.
            own = self.whole_metric.contributions(_chosen(columns, parts[domain]))
            return -standard_error(own), len(own)

        return parts[min(equals, key=sureness) if len(equals) > 1 else equals[0]], worst

    @override
    def problems(self, domains: Sequence[str], counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
        if WORST in domains:
            yield f"{self.name} is of the worst domain, and the rows have a domain {WORST!r}: give it another name"
        for domain in domains:
            yield from self._too_few(domain, counts)


def _rows_by_domain(columns: Columns) -> dict[str, list[int]]:
    """Return the positions of the rows of each domain, in the order of their first rows."""
    found: dict[str, list[int]] = {}
    for row, domain in enumerate(columns[DOMAIN]):
        found.setdefault(domain, []).append(row)
    return found


def _chosen(columns: Columns, rows: Sequence[int]) -> Columns:
    """Return the columns of some rows of the task, and no column of retained rows."""
    own = ((name, column) for name, column in columns.items() if name != FORGETTING.name)
    found: dict[str, list[Any]] = {name: [column[row] for row in rows] for name, column in own}
    return found
