"""How much a Triton program of the slot products takes at a time, and how it multiplies: by rule.

The rules ask for types and sizes, and are chosen from what compilers tell (registers, shared memory) and from counts,
not measured. There is no autotuner: tiles decide the order in which sums are rounded, so a result would depend on
what a timer said in that run, and a study could not be replayed. For the same reason no rule asks for the number of
slots: a slot alone is summed as in a pack of the same largest rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

#: Tokens of a slot up to which a program of `shrink` takes half as many.
FEW = 256
#: Programs that `outer` wants for a slot: 8 slots then fill an H100's 132 multiprocessors about twice.
PROGRAMS = 32
LEAST_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Tiles:
    """What a program takes at a time: tokens, features, ranks; its warps, the loads under way, how it multiplies.

    product, with its relative error (counted, not measured; sums are float32 in all):
        mma     operands of 16 bits, whose products are exact
        pieces  bfloat16 times a float32 split into three bfloat16 numbers, 3 x 8 bits of its 24: products are exact
        tf32x3  float32, each number as two of 11 bits: 2^-21 of a product
        ieee    float32 on the units for single products, of which an H100 does 67 TFLOP/s: it would wait for them, as
                a shrink of bfloat16 by rank 16 does 16 operations a byte, 48 TFLOP/s at the memory's 3 TB/s
    A tensor core cuts a sum to 24 bits after 8 or 16 products. For 4096 features that is about 3e-6 of the norm.
    """

    tokens: int
    features: int
    ranks: int
    warps: int
    stages: int
    product: str

    def constants(self) -> dict[str, Any]:
        """Return the arguments of a launch: block sizes, the product, warps and stages."""
        sizes = {"BLOCK_T": self.tokens, "BLOCK_D": self.features, "BLOCK_R": self.ranks}
        how = {"PRODUCT": self.product}
        return sizes | how | {"num_warps": self.warps, "num_stages": self.stages}


def shrink_tiles(tokens: int, rank: int, wide: torch.dtype, narrow: torch.dtype, device: torch.device) -> Tiles:
    """Choose the tiles of `shrink`: one pass over x up to rank 128.

    A program holds all features of its tokens in turn, so programs are few where tokens are: with 8 slots of 1024
    tokens 128, about the multiprocessors of an H100 (132), with 128 tokens 32. More would have to split the features
    and add the parts in a second launch, some microseconds; 8 x 128 tokens are 8 MB, 3 at 3 TB/s (counted).
    """
    product, ranks = product_of(wide, narrow, device), bucket(rank)
    if product == "ieee":
        return _ieee(ranks)
    features = 64 if ranks <= {"mma": 128, "pieces": 32, "tf32x3": 0}[product] else 32
    return Tiles(64 if tokens > FEW else 32, features, ranks, *_pace(ranks), product)


def expand_tiles(rank: int, narrow: torch.dtype, device: torch.device) -> Tiles:
    """Choose the tiles of `expand`, whose programs are many in any case. Ranks are taken one piece after the other."""
    product = product_of(narrow, narrow, device)
    if product == "ieee":
        return _ieee(16)
    if product == "mma":
        return Tiles(64, 128, min(32, bucket(rank)), 8, 2, product)
    return Tiles(64, 64, 16, 4, 2, product)


def outer_tiles(rank: int, wide: torch.dtype, narrow: torch.dtype, device: torch.device) -> Tiles:
    """Choose the tiles of `outer`: one pass over x up to rank 128."""
    product, ranks = product_of(wide, narrow, device), bucket(rank)
    if product == "ieee":
        return _ieee(ranks)
    if product == "tf32x3":
        return Tiles(32 if ranks < 64 else 16, 64, ranks, *_pace(ranks), product)
    tokens = 64 if wide.itemsize == 2 and ranks <= {"mma": 64, "pieces": 16}[product] else 32
    return Tiles(tokens, 128, ranks, *_pace(ranks), product)


def outer_chunk(tokens: int, features: int, tiles: Tiles) -> int:
    """Return the tokens that one program of `outer` sums: all, unless a slot then has fewer than `PROGRAMS` programs.

    A chunk of C tokens writes and reads 8 R bytes for 2 C bytes of a bfloat16 x, so it has at least `LEAST_CHUNK`.
    """
    chunks = max(1, min(tokens // LEAST_CHUNK, PROGRAMS // blocks(features, tiles.features)))
    return max(1, blocks(blocks(tokens, chunks), tiles.tokens)) * tiles.tokens


def candidate_tiles(tiles: Tiles) -> tuple[Tiles, ...]:
    """Return a rule's tiles and some of their neighbours, to be timed on a card.

    Triton raises OutOfResources at the launch of tiles that do not fit there.
    """
    others = [
        replace(tiles, features=2 * tiles.features),
        replace(tiles, features=max(32, tiles.features // 2)),
        replace(tiles, tokens=2 * tiles.tokens, warps=8),
        replace(tiles, tokens=max(16, tiles.tokens // 2)),
        replace(tiles, stages=tiles.stages - 1),
    ]
    return tuple(dict.fromkeys([tiles, *others]))


def product_of(wide: torch.dtype, narrow: torch.dtype, device: torch.device) -> str:
    """Return how `Tiles` multiply a wide by a narrow tensor, in the narrow one's type."""
    if narrow != torch.float32:
        return "mma"
    if device.type == "cuda" and not _splits_float32(device):
        return "ieee"
    return "pieces" if wide == torch.bfloat16 else "tf32x3"


@cache
def _splits_float32(device: torch.device) -> bool:
    """Whether tensor cores may multiply a float32 in parts.

    Before sm_80 they know neither bfloat16 nor tf32, and AMD's other ways were not compiled. Cached, because every
    launch asks.
    """
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


def bucket(rank: int) -> int:
    """Return the ranks of a tile: 16, 32, 64 or 128. `tl.dot` takes no side below 16; above 128 there are several."""
    return min(128, max(16, 1 << (rank - 1).bit_length()))


def _pace(ranks: int) -> tuple[int, int]:
    """Return warps and stages with which no kernel spills registers or takes the 99 KB of an sm_89's shared memory."""
    return (8, 3) if ranks == 128 else (4, 4)


def _ieee(ranks: int) -> Tiles:
    return Tiles(32, 64, min(32, ranks), 4, 2, "ieee")


def blocks(n: int, block: int) -> int:
    """Return the number of blocks that hold n."""
    return -(-n // block)
