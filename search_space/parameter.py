"""A tensor that an adapter or a router declares at a site."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

#: Size of a value on disk: float32, or int32 for indices.
NUMBER_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """The initial value of a factor of scale * B A, by a rule of `runtime/factors.py` that reads the site.

    `side`: A: [R, D_in] or B: [D_out, R].
    """

    rule: str
    side: Literal["A", "B"]
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """The initial value of indices: random numbers below `below`, none again before all have occurred."""

    below: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Flat indices of the elements of the frozen weight that a rule of `runtime/factors.py` ranks first, in order."""

    rule: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The entries of a matrix of an adapter that remain when it is pruned at its start, or their places.

    `of`: the adapter before, an `AdapterSpec`. They are those of the largest |value|, with `snip` of the largest
    |value * gradient|, the largest first. `tensor`: the name of the matrix; `units`: its axis of the elastic size,
    which comes first in places.
    """

    of: Any
    tensor: str
    units: Literal[0, 1]
    snip: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One tensor of an adapter at one site, without the bank dimension.

    - `init`: a rule of `runtime/init.py`, the initial value of all elements, a factor of a low-rank product, draws,
      places, or what a pruning keeps.
    - `decay`: whether weight decay applies. Vectors and scales around the identity are exempt, as usual.
    - `per_expert`: the first axis enumerates the experts of a mixture; the values of each are drawn independently.
    - `rows`: alternatively, the number of rows of each expert along the first axis, in the order of the experts.
    - `trainable`: whether training changes the values. The next three fields require that it is False.
    - `given`: folders of pretrained LoRAs that the values are read from: one per expert, or with `given_side` ("A" or
      "B") the principal directions of all their A or B, completed by those of `init`.
    - `key`: the seed that the values are drawn from, independent of the slot's seed. The recipe contains this seed, so
      the values are not stored. All other frozen values are, because the trained ones are useless without them.
    - `indices`: the values are integers; they do not count as parameters.
    - `scope`: "site", or "role" if all sites of the same role with the same input and output features share the tensor,
      or "shape" if all sites with the same features do, or "model" if all sites do, among the sites with adapters of
      this kind. A shared tensor exists once, in the largest shape that a site declares; each site reads the prefix of
      the shape that it declares.
    """

    shape: tuple[int, ...]
    init: str | float | Factor | Draws | Places | Kept = "zeros"
    decay: bool = True
    per_expert: bool = False
    rows: tuple[int, ...] = ()
    given: tuple[str, ...] = ()
    given_side: str = ""
    trainable: bool = True
    key: int | None = None
    indices: bool = False
    scope: Literal["site", "role", "shape", "model"] = "site"
    bits: float = NUMBER_BITS

    def __post_init__(self) -> None:
        if self.trainable and (self.given or self.key is not None or self.indices):
            raise ValueError("a parameter that is given, is drawn from a key or has indices needs trainable=False")
        if self.scope != "site" and (self.given or self.indices or self.per_expert or self.rows):
            raise ValueError("a shared parameter (scope is not 'site') cannot have given, indices, per_expert or rows")

    @property
    def count(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def stored(self) -> bool:
        """Whether the values are written to disk; values drawn from a key are not."""
        return self.key is None

    @property
    def stored_bits(self) -> int:
        """Size of the values on disk, in bits."""
        return round(self.count * self.bits) if self.stored else 0
