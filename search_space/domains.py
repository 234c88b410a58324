"""Domains: the sets of values that one gene of a search space may take.

A domain maps its values to the unit interval and back (`to_unit`, `from_unit`), so that a searcher works on numbers
between 0 and 1 only. The values of a choice are equally spaced, in the order of the list; only an ordered choice
(ranks 1, 2, 4, 8, ...) gives that order a meaning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

Value = int | float | str | bool

#: Largest size, count and number of a setting: far above all that can be trained, and small enough to calculate with.
MOST = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Float:
    """Real numbers in [low, high], on a logarithmic scale if `log`.

    `from_unit` returns a bound or, between the bounds, a number of few digits: recipes stay readable, and the value is
    bit for bit the same after `to_unit` and `from_unit`. Raises ValueError for bounds out of order or not finite.
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
        """Number of values; None because a real interval is uncountable."""
        return None

    def contains(self, value: Any) -> bool:
        """Return whether `value` is a number within the bounds; a bool is not a number here."""
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high

    def to_unit(self, value: Any) -> float:
        """Return the position of `value` in [0, 1]."""
        if self.log:
            unit = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            unit = (value - self.low) / (self.high - self.low)
        return min(max(unit, 0.0), 1.0)

    def from_unit(self, unit: float) -> float:
        """Return the rounded value at a position; positions outside [0, 1] give the bounds."""
        if unit <= 0.0:
            return self.low
        if unit >= 1.0:
            return self.high
        if self.log:
            value = math.exp(math.log(self.low) + unit * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + unit * (self.high - self.low)
        value = self._short(value)
        # A value that rounds like a bound becomes that bound, so that no two values are closer than the digits resolve.
        if value <= self._short(self.low):
            return self.low
        return self.high if value >= self._short(self.high) else value

    def _short(self, value: float) -> float:
        """Round to six significant digits on a log scale, else to a millionth of the range, within float precision."""
        if self.log:
            return float(f"{value:.6g}")
        exponent = math.floor(math.log10(self.high - self.low))
        largest = math.floor(math.log10(max(abs(self.low), abs(self.high))))
        return round(value, min(6 - exponent, 12 - largest))

    def sample(self, rng: Random) -> float:
        """Draw a value uniformly on the unit interval."""
        return self.from_unit(rng.random())

    def neighbours(self, value: Any) -> Iterator[float]:
        """Yield the values one fifth of the range below and above, or the bound if that is nearer."""
        unit = self.to_unit(value)
        steps = dict.fromkeys((self.from_unit(unit - 0.2), self.from_unit(unit + 0.2)))
        # In a range of a few representable numbers, a fifth can round to zero.
        bounds = dict.fromkeys((self.from_unit(0.0), self.from_unit(1.0)))
        yield from [other for other in steps if other != value] or [other for other in bounds if other != value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Int:
    """Whole numbers low, low + step, ..., high; on a logarithmic scale if `log` (then step is 1).

    Raises ValueError for bounds that are not whole or out of order, and for a step that does not reach `high`.
    """

    low: int
    high: int
    step: int = 1
    log: bool = False

    def __post_init__(self) -> None:
        if not all(isinstance(n, int) for n in (self.low, self.high, self.step)):
            raise ValueError(
                f"low, high and step must be whole numbers, got low={self.low}, high={self.high}, step={self.step}"
            )
        if not self.low <= self.high:
            raise ValueError(f"low must not be above high, got low={self.low}, high={self.high}")
        if self.step < 1 or (self.high - self.low) % self.step:
            found = f"low={self.low}, high={self.high}, step={self.step}"
            raise ValueError(f"step must be positive and divide high - low, got {found}")
        if self.log and (self.low < 1 or self.step != 1):
            raise ValueError("a log range of whole numbers needs low >= 1 and step 1")

    @property
    def cardinality(self) -> int:
        """Number of values."""
        return (self.high - self.low) // self.step + 1

    def contains(self, value: Any) -> bool:
        """Return whether `value` is one of these integers; a bool is none."""
        return (
            isinstance(value, int)
            and not isinstance(value, bool)
            and self.low <= value <= self.high
            and (value - self.low) % self.step == 0
        )

    def to_unit(self, value: Any) -> float:
        """Return the centre of the cell of `value` in [0, 1]."""
        if self.log:
            # The cell of a number v runs from v - 1/2 to v + 1/2 on the log axis.
            low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
            return (math.log(value) - low) / (high - low)
        return float(((value - self.low) // self.step + 0.5) / self.cardinality)

    def from_unit(self, unit: float) -> int:
        """Return the value whose cell holds a position; positions outside [0, 1] give the bounds."""
        unit = min(max(unit, 0.0), 1.0)
        if self.log:
            low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
            return min(max(round(math.exp(low + unit * (high - low))), self.low), self.high)
        return self.low + self.step * min(int(unit * self.cardinality), self.cardinality - 1)

    def sample(self, rng: Random) -> int:
        """Draw a value uniformly on the unit interval."""
        return self.from_unit(rng.random())

    def neighbours(self, value: Any) -> Iterator[int]:
        """Yield the next value below and the next above."""
        for other in (value - self.step, value + self.step):
            if self.contains(other):
                yield other


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of `choices`. `ordered`: values next to each other in the list are similar (sizes, learning rates).

    Raises ValueError for no values or a duplicate.
    """

    choices: tuple[Value, ...]
    ordered: bool = False

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError("a choice needs at least one value")
        object.__setattr__(self, "choices", tuple(self.choices))
        # True is not 1 here, but 16 is 16.0.
        if len({(isinstance(c, bool), c) for c in self.choices}) != len(self.choices):
            raise ValueError(f"duplicate value in {list(self.choices)}")

    @classmethod
    def of(cls, values: Sequence[Value]) -> Choice:
        """Return the choice that a list in a study file means: ordered and sorted if all values are numbers."""
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            return cls(choices=tuple(sorted(values)), ordered=True)
        return cls(choices=tuple(values))

    @property
    def cardinality(self) -> int:
        """Number of values."""
        return len(self.choices)

    def index(self, value: Any) -> int:
        """Return the position of `value` in the list; True is not 1 here. Raises ValueError for a value not in it."""
        for position, choice in enumerate(self.choices):
            if choice == value and isinstance(choice, bool) == isinstance(value, bool):
                return position
        raise ValueError(f"{value!r} is not among {list(self.choices)}")

    def contains(self, value: Any) -> bool:
        """Return whether `value` is in the list."""
        try:
            self.index(value)
        except ValueError:
            return False
        return True

    def to_unit(self, value: Any) -> float:
        """Return the centre of the cell of `value` in [0, 1]. Raises ValueError for a value not in the list."""
        return (self.index(value) + 0.5) / len(self.choices)

    def from_unit(self, unit: float) -> Value:
        """Return the value whose cell holds a position; positions outside [0, 1] give the first or the last."""
        unit = min(max(unit, 0.0), 1.0)
        return self.choices[min(int(unit * len(self.choices)), len(self.choices) - 1)]

    def sample(self, rng: Random) -> Value:
        """Draw a value uniformly."""
        return self.choices[rng.randrange(len(self.choices))]

    def neighbours(self, value: Any) -> Iterator[Value]:
        """Yield the values next to this one in an ordered list, all others in an unordered one."""
        here = self.index(value)
        for position, choice in enumerate(self.choices):
            if position != here and (not self.ordered or abs(position - here) == 1):
                yield choice


Domain = Float | Int | Choice
BOOLEAN = Choice(choices=(False, True))


def listed(setting: Domain | Value | None) -> tuple[Value | None, ...]:
    """Return the values of a list, or the setting itself as the only one."""
    return setting.choices if isinstance(setting, Choice) else (setting,)  # type: ignore[return-value]


def without_zero(domain: Domain) -> Domain:
    """Return the domain without 0: the sizes of an adapter that is on. A domain without 0 is returned as it is.

    Raises ValueError if no value is left.
    """
    if isinstance(domain, Choice) and domain.contains(0):
        if len(domain.choices) == 1:
            raise ValueError("0 is the only size: the adapter could never be on")
        return Choice(choices=tuple(c for c in domain.choices if c != 0), ordered=domain.ordered)
    if isinstance(domain, Int) and domain.low == 0:
        if domain.high == 0:
            raise ValueError("0 is the only size: the adapter could never be on")
        return Int(low=domain.step, high=domain.high, step=domain.step)
    return domain
