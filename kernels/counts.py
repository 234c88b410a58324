"""Operations and least bytes of the slot products and of matrix products, the bounds for a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: Sizes of a tensor, which PyTorch hands to a FLOP formula in the tensor's place.
Shape = Sequence[int]


@dataclass(frozen=True, slots=True)
class Count:
    """Operations (a multiplication and an addition are two), and bytes: each tensor read or written once."""

    flops: int
    nbytes: int

    def __add__(self, other: Count) -> Count:
        return Count(self.flops + other.flops, self.nbytes + other.nbytes)


def shrink_count(
    slots: int, tokens: int, features: int, rank: int, wide: torch.dtype, narrow: torch.dtype, factor: bool = True
) -> Count:
    """Count `shrink`: x and w are read (wide: x's type), h is written. factor adds R numbers, its products are free."""
    own = tokens * rank + rank * features + (rank if factor else 0)
    nbytes = tokens * features * wide.itemsize + own * narrow.itemsize
    return Count(2 * slots * tokens * features * rank, slots * nbytes)


def expand_count(
    slots: int, tokens: int, features: int, rank: int, wide: torch.dtype, narrow: torch.dtype, base: bool = True
) -> Count:
    """Count `expand` and `expand_`: h, w and the base are read (wide: its type and y's), y is written."""
    nbytes = tokens * features * wide.itemsize * (2 if base else 1) + (tokens + features) * rank * narrow.itemsize
    return Count(2 * slots * tokens * features * rank, slots * nbytes)


def outer_count(
    slots: int, tokens: int, features: int, rank: int, wide: torch.dtype, narrow: torch.dtype, chunks: int = 1
) -> Count:
    """Count `outer`: h and x are read, g is written; several chunks are each written and read in float32 before."""
    nbytes = tokens * features * wide.itemsize + (tokens + features) * rank * narrow.itemsize
    between = 8 * chunks * rank * features if chunks > 1 else 0
    return Count(2 * slots * tokens * features * rank, slots * (nbytes + between))


def matmul_count(rows: int, inner: int, columns: int, dtype: torch.dtype) -> Count:
    """Count the product of two matrices, such as that of a frozen layer. A bias is not counted."""
    nbytes = (rows * inner + inner * columns + rows * columns) * dtype.itemsize
    return Count(2 * rows * inner * columns, nbytes)
