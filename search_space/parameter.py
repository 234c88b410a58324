"""A tensor that an adapter or a router declares at a site."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One tensor of an adapter at one site, without the bank dimension.

    `init` names a rule of `init.py`, or is what all values start as. `decay`: whether weight decay applies (vectors and
    identity-centred scales are left out, as usual). `per_expert`: the first axis counts the experts of a mixture, each
    of which is drawn by itself. `rows`: or it has so many places of each expert, one expert after the other.

    `trainable`: if not, it stays as it is at the start: `given`: folders that the values are read from; `key`: the seed
    that it is drawn from, whatever the slot's. The recipe has that seed, so these values are not stored; all others
    are, for what was trained means nothing without them. `indices`: whole numbers, of which no type counts the size
    among its parameters.

    `scope`: with "shape", all sites of as many features in and out share it, with "model" all sites, as far as adapters
    of its kind sit there. It then exists once, as large as the largest that one of them declares; each reads the prefix
    that it declares itself.
    """

    shape: tuple[int, ...]
    init: str | float = "zeros"
    decay: bool = True
    per_expert: bool = False
    rows: tuple[int, ...] = ()
    given: tuple[str, ...] = ()
    trainable: bool = True
    key: int | None = None
    indices: bool = False
    scope: Literal["site", "shape", "model"] = "site"

    def __post_init__(self) -> None:
        if self.trainable and (self.given or self.key is not None or self.indices):
            raise ValueError("values that are given, drawn from a key, or indices are not trained")
        if self.scope != "site" and (self.given or self.indices or self.per_expert or self.rows):
            raise ValueError("sites share no values that are given, indices, or experts'")

    @property
    def count(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def stored(self) -> bool:
        """Whether the values are written to disk: those that are drawn from a key are not."""
        return self.key is None
