"""Domains: the sets of values that one gene of a search space may take.

A domain maps its values to the unit interval and back (`to_unit`, `from_unit`), so that a searcher works on numbers
between 0 and 1 only. Ordered choices (ranks 1, 2, 4, 8, ...) are equally spaced on it, unordered ones are just cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

Value = int | float | str | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Float:
    """Real numbers in [low, high], on a logarithmic scale if `log`.

    `from_unit` yields the bounds and, between them, numbers of few digits: recipes stay readable, and such a value
    survives the way to the unit interval and back to the bit.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))
        if not (self.low < self.high and math.isfinite(self.high - self.low)):
            raise ValueError(f"low must be below high and both finite, got low={self.low}, high={self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range needs low > 0, got low={self.low}")

    @property
    def cardinality(self) -> int | None:
        """None: not countable."""
        return None

    def contains(self, value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high

    def to_unit(self, value: Any) -> float:
        if self.log:
            unit = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            unit = (value - self.low) / (self.high - self.low)
        return min(max(unit, 0.0), 1.0)

    def from_unit(self, unit: float) -> float:
        if unit <= 0.0:
            return self.low
        if unit >= 1.0:
            return self.high
        if self.log:
            value = math.exp(math.log(self.low) + unit * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + unit * (self.high - self.low)
        value = self._short(value)
        # A bound stands for all that is as short as it, so that no two values are closer than the digits tell.
        if value <= self._short(self.low):
            return self.low
        return self.high if value >= self._short(self.high) else value

    def _short(self, value: float) -> float:
        """Six significant digits on a log scale; else a millionth of the range, and no more than floats can hold."""
        if self.log:
            return float(f"{value:.6g}")
        exponent = math.floor(math.log10(self.high - self.low))
        largest = math.floor(math.log10(max(abs(self.low), abs(self.high))))
        return round(value, min(6 - exponent, 12 - largest))

    def sample(self, rng: Random) -> float:
        return self.from_unit(rng.random())

    def neighbours(self, value: Any) -> Iterator[float]:
        """One fifth of the range down and up, or the bound if that is nearer."""
        unit = self.to_unit(value)
        steps = dict.fromkeys((self.from_unit(unit - 0.2), self.from_unit(unit + 0.2)))
        # In a range of a few representable numbers a fifth rounds to nothing.
        bounds = dict.fromkeys((self.from_unit(0.0), self.from_unit(1.0)))
        yield from [other for other in steps if other != value] or [other for other in bounds if other != value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Int:
    """Whole numbers low, low + step, ..., high; on a logarithmic scale if `log` (then step is 1)."""

    low: int
    high: int
    step: int = 1
    log: bool = False

    def __post_init__(self) -> None:
        if not all(isinstance(n, int) for n in (self.low, self.high, self.step)):
            raise ValueError(f"must be whole: low={self.low}, high={self.high}, step={self.step}")
        if not self.low <= self.high:
            raise ValueError(f"low must not be above high, got low={self.low}, high={self.high}")
        if self.step < 1 or (self.high - self.low) % self.step:
            raise ValueError(f"step={self.step} does not lead from low={self.low} to high={self.high}")
        if self.log and (self.low < 1 or self.step != 1):
            raise ValueError("a log range of whole numbers needs low >= 1 and step 1")

    @property
    def cardinality(self) -> int:
        return (self.high - self.low) // self.step + 1

    def contains(self, value: Any) -> bool:
        return (
            isinstance(value, int)
            and not isinstance(value, bool)
            and self.low <= value <= self.high
            and (value - self.low) % self.step == 0
        )

    def to_unit(self, value: Any) -> float:
        if self.log:
            # Each whole number has the share of the log axis from v - 1/2 to v + 1/2.
            low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
            return (math.log(value) - low) / (high - low)
        return ((value - self.low) // self.step + 0.5) / self.cardinality

    def from_unit(self, unit: float) -> int:
        unit = min(max(unit, 0.0), 1.0)
        if self.log:
            low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
            return min(max(round(math.exp(low + unit * (high - low))), self.low), self.high)
        return self.low + self.step * min(int(unit * self.cardinality), self.cardinality - 1)

    def sample(self, rng: Random) -> int:
        return self.from_unit(rng.random())

    def neighbours(self, value: Any) -> Iterator[int]:
        """The next ones down and up."""
        for other in (value - self.step, value + self.step):
            if self.contains(other):
                yield other


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of `choices`. `ordered`: neighbours in the list are neighbours in meaning (sizes, learning rates)."""

    choices: tuple[Value, ...]
    ordered: bool = False

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError("a choice needs at least one value")
        object.__setattr__(self, "choices", tuple(self.choices))
        # True is not 1 here, but 16 is 16.0.
        if len({(isinstance(c, bool), c) for c in self.choices}) != len(self.choices):
            raise ValueError(f"a value stands twice in {list(self.choices)}")

    @classmethod
    def of(cls, values: Sequence[Value]) -> Choice:
        """A choice as a study file lists it: numbers are sorted and ordered, everything else is not."""
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            return cls(choices=tuple(sorted(values)), ordered=True)
        return cls(choices=tuple(values))

    @property
    def cardinality(self) -> int:
        return len(self.choices)

    def index(self, value: Any) -> int:
        """The position of `value`; True is not 1 here. Raises ValueError for a value that is not in the list."""
        for position, choice in enumerate(self.choices):
            if choice == value and isinstance(choice, bool) == isinstance(value, bool):
                return position
        raise ValueError(f"{value!r} is not among {list(self.choices)}")

    def contains(self, value: Any) -> bool:
        try:
            self.index(value)
        except ValueError:
            return False
        return True

    def to_unit(self, value: Any) -> float:
        return (self.index(value) + 0.5) / len(self.choices)

    def from_unit(self, unit: float) -> Value:
        unit = min(max(unit, 0.0), 1.0)
        return self.choices[min(int(unit * len(self.choices)), len(self.choices) - 1)]

    def sample(self, rng: Random) -> Value:
        return self.choices[rng.randrange(len(self.choices))]

    def neighbours(self, value: Any) -> Iterator[Value]:
        """The ones beside it in the list; all others if the list has no order."""
        here = self.index(value)
        for position, choice in enumerate(self.choices):
            if position != here and (not self.ordered or abs(position - here) == 1):
                yield choice


Domain = Float | Int | Choice
BOOLEAN = Choice(choices=(False, True))


def without_zero(domain: Domain) -> Domain:
    """The sizes of a domain once "is it on" has been answered with yes; the domain itself if it has no 0.

    Raises ValueError when nothing is left.
    """
    if isinstance(domain, Choice) and domain.contains(0):
        if len(domain.choices) == 1:
            raise ValueError("0 is the only size: nothing could ever be on")
        return Choice(choices=tuple(c for c in domain.choices if c != 0), ordered=domain.ordered)
    if isinstance(domain, Int) and domain.low == 0:
        if domain.high == 0:
            raise ValueError("0 is the only size: nothing could ever be on")
        return Int(low=domain.step, high=domain.high, step=domain.step)
    return domain
