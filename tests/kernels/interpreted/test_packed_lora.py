"""The Triton kernels of the packed adapters under Triton's interpreter: the products, and LoRA made of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import torch
from torch import Tensor

from autopeft.kernels import slot_products
from autopeft.kernels import tiles as tile_rules
from autopeft.kernels.packed_lora import (
    packed_lora,
    packed_lora_linear,
    packed_lora_linear_reference,
    packed_lora_reference,
)
from autopeft.kernels.tiles import Tiles

from ..test_kernels import Draw, mask_of, root_mean_square_ratio

torch.set_num_threads(1)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
#: Types of the backbone and of the adapter.
TYPES = pytest.mark.parametrize(
    ("wide_type", "narrow_type"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),
    ],
    ids=["fp32", "mixed", "bf16", "mixed fp16", "fp16"],
)
# Over and under the blocks of tokens, of 64 features and of 16 to 128 ranks; ranks that differ by slot; rank 1.
RANKS = pytest.mark.parametrize("ranks", [(1,), (1, 5, 3), (3, 33), (64, 8), (65,)])
T, D_IN, D_OUT = 37, 67, 35


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN; sums over tokens are of several chunks."""

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    monkeypatch.setattr(slot_products, "_empty", empty)
    monkeypatch.setattr(slot_products, "outer_chunk", lambda tokens, features, tiles: tiles.tokens)


def assert_close(
    op: Callable[..., Tensor], reference: Callable[..., Tensor], leaves: list[Tensor], *args: Any, tolerance: float
) -> None:
    """Output and the gradient of every leaf, against the reference in float32."""
    exact = {id(leaf): leaf.detach().float().requires_grad_() for leaf in leaves}
    others = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    out = op(*args)
    expected = reference(*(exact.get(id(arg), other) for arg, other in zip(args, others, strict=True)))
    weight = Draw(7, out.dtype).constant(*out.shape)  # exact in both types
    ours = [out, *torch.autograd.grad(out, leaves, weight)]
    theirs = [expected, *torch.autograd.grad(expected, list(exact.values()), weight.float())]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.isfinite().all()
        if mine.numel() > 1 or mine.dtype == torch.float32:  # a single bfloat16 sum may cancel
            assert root_mean_square_ratio(mine, other) <= tolerance


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, no axis dense in memory, as a leaf of its own."""
    k, t, d = tensor.shape
    return (
        torch.empty(t, k, 2 * d, dtype=tensor.dtype)[..., ::2].transpose(0, 1).copy_(tensor.detach()).requires_grad_()
    )


@TYPES
@RANKS
def test_lora(ranks: tuple[int, ...], wide_type: torch.dtype, narrow_type: torch.dtype) -> None:
    k, r, wide, narrow = len(ranks), max(ranks), Draw(0, wide_type), Draw(1, narrow_type)
    x, a, b = strided(wide(k, T, D_IN)), narrow(k, r, D_IN), narrow(k, D_OUT, r)
    args = (x, a, b, narrow.scale(k), mask_of(ranks, narrow_type))
    assert_close(packed_lora, packed_lora_reference, [x, a, b], *args, tolerance=TOLERANCE[wide_type])


@TYPES
@RANKS
@pytest.mark.parametrize("served", ["all", "some"])
def test_lora_linear(ranks: tuple[int, ...], wide_type: torch.dtype, narrow_type: torch.dtype, served: str) -> None:
    s, r, wide, narrow = len(ranks), max(ranks), Draw(0, wide_type), Draw(1, narrow_type)
    slots = torch.tensor([3, 0, 2][:s]) if served == "some" else None
    x, a, b = strided(wide(s if slots is None else 4, T, D_IN)), narrow(s, r, D_IN), narrow(s, D_OUT, r)
    args = (x, wide.constant(D_OUT, D_IN), wide.constant(D_OUT), a, b, narrow.scale(s), mask_of(ranks, narrow_type))
    functions = (packed_lora_linear, packed_lora_linear_reference)
    assert_close(*functions, [x, a, b], *args, slots, tolerance=TOLERANCE[wide_type])


def check_products(
    tokens: int,
    rank: int,
    types: tuple[torch.dtype, torch.dtype],
    tiles: Callable[[Tiles], Tiles] = lambda tiles: tiles,
) -> None:
    """Each product with what `tiles` makes of its rule's, against PyTorch in float32; nothing is dense in memory."""
    wide, narrow, slots, device = Draw(0, types[0]), Draw(1, types[1]), torch.tensor([2, 0]), torch.device("cpu")
    x, w = strided(wide(3, tokens, D_IN)).detach(), strided(narrow(2, rank, D_IN)).detach()
    h, factor = narrow.constant(2, tokens, rank), narrow.constant(2, rank)
    chosen, narrow_w, narrow_h = x[slots].float(), w.float(), h.float()
    y = strided(wide(3, tokens, D_IN)).detach()
    expected = y.float().index_add(0, slots, narrow_h @ narrow_w)
    for_shrink = tiles(tile_rules.shrink_tiles(tokens, rank, *types, device))
    for_outer, for_expand = (
        tiles(tile_rules.outer_tiles(rank, *types, device)),
        tiles(tile_rules.expand_tiles(rank, types[1], device)),
    )
    down = (chosen @ narrow_w.mT) * factor.float()[:, None, :]
    dense = w.mT.contiguous().mT
    pairs = [
        *((slot_products.triton_shrink(x, own, factor, slots, for_shrink), down) for own in (w, w.contiguous(), dense)),
        (slot_products.triton_outer(h, x, slots, for_outer), narrow_h.mT @ chosen),
        (slot_products.triton_expand(h, dense.mT, y, y.clone(), slots, for_expand)[slots], expected[slots]),
        (slot_products.triton_expand(h, w.mT, y, y, slots, for_expand), expected),
    ]
    for ours, theirs in pairs:
        assert root_mean_square_ratio(ours, theirs) <= TOLERANCE[types[0]]


# Each bucket at its edges, aligned and not, and two tiles of ranks.
@TYPES
@pytest.mark.parametrize("rank", [1, 16, 17, 32, 33, 64, 65, 128, 130])
def test_products(rank: int, wide_type: torch.dtype, narrow_type: torch.dtype) -> None:
    check_products(T, rank, (wide_type, narrow_type))


@TYPES
def test_many_tokens(wide_type: torch.dtype, narrow_type: torch.dtype) -> None:
    check_products(tile_rules.FEW + 3, 40, (wide_type, narrow_type))


@TYPES
@pytest.mark.parametrize("number", range(6))
def test_other_tiles(number: int, wide_type: torch.dtype, narrow_type: torch.dtype) -> None:
    def other(tiles: Tiles) -> Tiles:
        candidates = tile_rules.candidate_tiles(tiles)
        return candidates[number % len(candidates)]

    check_products(70, 20, (wide_type, narrow_type), other)


def test_products_one_by_one() -> None:
    check_products(T, 20, (torch.bfloat16, torch.float32), lambda tiles: tile_rules.Tiles(32, 64, 16, 4, 2, "ieee"))


def test_a_split_number_is_exact() -> None:
    """bfloat16 x float32 in pieces: products of single terms have all bits; the largest and smallest, too."""
    x = torch.zeros(1, 1, 3, dtype=torch.bfloat16)
    x[..., 1] = 1.0
    w = torch.zeros(1, 9, 3)
    w[0, :, 1] = torch.tensor([1 + 2**-23, -1 / 3, 3.3e38, 1e-30, 2**24 - 1, 0.1, 7e-20, -(2**-126), 5.0])
    assert torch.equal(slot_products.triton_shrink(x, w, None, None)[0, 0], w[0, :, 1])
    h = torch.zeros(1, 3, 9)
    h[0, 1] = w[0, :, 1]
    assert torch.equal(slot_products.triton_outer(h, x.mT, None)[0, :, 0], w[0, :, 1])


def test_nothing_to_do() -> None:
    """No tokens, no slots: the sum over no tokens is 0."""
    draw = Draw(0, torch.float32)
    for slots, tokens in ((2, 0), (0, 5)):
        x, w, h = draw.constant(slots, tokens, 7), draw.constant(slots, 3, 7), draw.constant(slots, tokens, 3)
        assert slot_products.triton_shrink(x, w, None, None).shape == h.shape
        assert slot_products.triton_expand(h, w.mT, None, x).shape == x.shape
        assert torch.equal(slot_products.triton_outer(h, x, None), torch.zeros(slots, 3, 7))


def test_triton_runs_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but float64, and not where it is switched off."""
    calls = []
    for name in ("shrink", "expand", "outer"):
        own = getattr(slot_products, f"triton_{name}")
        monkeypatch.setattr(
            slot_products, f"triton_{name}", lambda *args, name=name, own=own: calls.append(name) or own(*args)
        )
    for dtype in (torch.float32, torch.float64):
        draw = Draw(0, dtype)
        x, a, b, scale = draw(2, 5, 7), draw(2, 3, 7), draw(2, 9, 3), draw.scale(2)
        with slot_products.without_triton() if dtype == torch.float32 else contextlib.nullcontext():
            packed_lora(x, a, b, scale).sum().backward()
        assert not calls
    packed_lora(x.float(), a.float(), b.float(), scale.float()).sum().backward()
    assert sorted(calls) == ["expand", "expand", "outer", "outer", "shrink", "shrink"]


def test_a_base_in_float64_stays_exact() -> None:
    draw = Draw(0, torch.float32)
    h, w, base = draw.constant(1, 2, 3), draw.constant(1, 4, 3), torch.full((1, 2, 4), 1e12, dtype=torch.float64)
    torch.testing.assert_close(slot_products.expand_(base.clone(), h, w) - base, (h @ w.mT).double(), rtol=0, atol=1e-3)


def test_sums_do_not_depend_on_the_run() -> None:
    draw = Draw(0, torch.float32)
    h, x = draw.constant(2, 150, 3), draw.constant(2, 150, 17)
    assert torch.equal(slot_products.triton_outer(h, x, None), slot_products.triton_outer(h, x, None))


def test_a_slot_alone_is_the_slot_in_a_pack() -> None:
    draw = Draw(0, torch.float32)
    x, w, h = draw.constant(3, T, D_IN), draw.constant(3, 20, D_IN), draw.constant(3, T, 20)

    def results(x: Tensor, w: Tensor, h: Tensor) -> list[Tensor]:
        expanded = slot_products.triton_expand(h, w.mT, x, torch.empty_like(x))
        return [slot_products.triton_shrink(x, w, None, None), expanded, slot_products.triton_outer(h, x, None)]

    for alone, packed in zip(results(x[1:2], w[1:2], h[1:2]), results(x, w, h), strict=True):
        assert torch.equal(alone[0], packed[1])
