"""Metrics of generated texts: numbers of each row from its prompt, the generated text and the reference."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from typing_extensions import override

from autopeft.search_space.metrics.base import Columns, MetricError, PerExample

#: The columns of texts, a string per example.
PROMPTS, GENERATED, REFERENCES = TEXTS = ("prompts", "generated", "references")
#: Those of programs: what precedes the text in its program, the text with the white space at its beginning, and tests.
STARTS, CONTINUATIONS, TESTS = PROGRAMS = ("starts", "continuations", "tests")
#: What rounding may add to the numbers of a metric beyond its best or worst value.
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class OfTexts(PerExample):
    """The mean of the numbers that `of` computes from the texts of each row.

    A subclass implements `of`. `reads`: the columns that `of` takes. `runs_code`: whether it runs generated programs,
    to which a study must consent. The evaluator adds these columns, and `with_numbers` the column of the metric, of
    which the value and the contributions are computed.
    """

    reads: ClassVar[tuple[str, str, str]] = TEXTS
    runs_code: ClassVar[bool] = False

    @override
    def computable(self, columns: Collection[str]) -> bool:
        return self.name in columns or set(TEXTS) <= set(columns)

    @abstractmethod
    def of(self, prompts: Sequence[str], generated: Sequence[str], references: Sequence[str]) -> Sequence[float]:
        """Return a number per row, [N], from the texts, [N] each. Raises MetricError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareOfTexts(OfTexts):
    """A metric of texts whose numbers are from 0 to 1, larger is better."""

    unit: str = "share"
    maximise: bool = True
    bound: float | None = 1.0
    worst: float | None = 0.0


def with_numbers(columns: Columns, metrics: Sequence[OfTexts]) -> Columns:
    """Return the columns with one of the name of each metric in place of the texts. Raises MetricError."""
    numbers = {metric.name: _checked(metric, *(columns[name] for name in metric.reads)) for metric in metrics}
    return {**{name: column for name, column in columns.items() if name not in (*TEXTS, *PROGRAMS)}, **numbers}


def _checked(metric: OfTexts, *texts: Sequence[str]) -> Sequence[float]:
    """Return the numbers of a metric. Raises MetricError for numbers that it cannot have."""
    numbers = metric.of(*texts)
    if len(numbers) != len(texts[0]):
        raise MetricError(f"the metric {metric.name} has {len(numbers):,} numbers for {len(texts[0]):,} rows")
    ends = [end for end in (metric.worst, metric.bound) if end is not None]
    low, high = (min(ends), max(ends)) if len(ends) == 2 else (-math.inf, math.inf)
    for row, number in enumerate(numbers, start=1):
        if not (math.isfinite(number) and low - ROUNDING <= number <= high + ROUNDING):
            raise MetricError(f"the metric {metric.name} is {number} in row {row}, not from {low:g} to {high:g}")
    return numbers


def _agree(found: Sequence[bool]) -> list[float]:
    return [float(one) for one in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactMatch(ShareOfTexts):
    """1 where the generated text is the reference, apart from white space at its beginning and end, else 0."""

    name: str = "exact-match"
    summary: str = "generated texts of the validation rows that are the reference, apart from white space around them"

    @override
    def of(self, prompts: Sequence[str], generated: Sequence[str], references: Sequence[str]) -> Sequence[float]:
        pairs = zip(generated, references, strict=True)
        return _agree([own.strip() == reference.strip() for own, reference in pairs])


@dataclass(frozen=True, slots=True, kw_only=True)
class RegexMatch(ShareOfTexts):
    """1 where the study's pattern is found in the generated text, else 0.

    A pattern with groups compares what they capture: 1 where the groups of its first match in the generated text are
    those of its first match in the reference. `pattern`: of Python's module `re`.
    """

    name: str = "regex-match"
    summary: str = "generated texts of the validation rows that agree with the study's pattern, generation.pattern"
    pattern: str = ""

    def with_pattern(self, pattern: str) -> RegexMatch:
        """Return the metric with the pattern of a study."""
        return replace(self, pattern=pattern)

    @override
    def of(self, prompts: Sequence[str], generated: Sequence[str], references: Sequence[str]) -> Sequence[float]:
        pattern = re.compile(self.pattern)
        if not pattern.groups:
            return _agree([pattern.search(own) is not None for own in generated])
        pairs = zip(generated, references, strict=True)
        return _agree([_captured(pattern, own) == _captured(pattern, expected, self) for own, expected in pairs])


def _captured(pattern: re.Pattern[str], text: str, required_by: RegexMatch | None = None) -> tuple[str, ...] | None:
    """Return what the groups of the first match capture. Raises MetricError if a match is required and missing."""
    match = pattern.search(text)
    if match is None and required_by is not None:
        raise MetricError(
            f"the metric {required_by.name}: the groups of generation.pattern are compared with those in the reference,"
            f" and it is not found in the reference {text!r:.80}"
        )
    return None if match is None else match.groups()
