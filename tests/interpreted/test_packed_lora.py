"""The Triton kernels of the packed adapters under Triton's interpreter: the products, and LoRA made of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import torch
from torch import Tensor

from autopeft.kernels import slot_products
from autopeft.kernels.packed_lora import (
    packed_lora,
    packed_lora_linear,
    packed_lora_linear_reference,
    packed_lora_reference,
)

from ..test_kernels import Draw, mask_of, root_mean_square_ratio

torch.set_num_threads(1)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
#: Types of the backbone and of the adapter.
TYPES = pytest.mark.parametrize(
    ("wide_type", "narrow_type"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["fp32", "mixed", "bf16"],
)
# Over and under the blocks of 32 tokens, 64 features, 32 ranks; ranks that differ by slot; rank 1.
RANKS = pytest.mark.parametrize("ranks", [(1,), (1, 5, 3), (3, 33)])
T, D_IN, D_OUT = 37, 67, 35


@pytest.fixture(autouse=True)
def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op through Triton, on the CPU; what a kernel does not write is NaN; sums over tokens in two chunks."""

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    monkeypatch.setattr(slot_products, "by_triton", lambda *tensors: True)
    monkeypatch.setattr(slot_products, "_empty", poisoned)
    monkeypatch.setattr(slot_products, "CHUNK_T", slot_products.BLOCK_T)


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


@TYPES
def test_products(wide_type: torch.dtype, narrow_type: torch.dtype) -> None:
    wide, narrow, slots, r = Draw(0, wide_type), Draw(1, narrow_type), torch.tensor([2, 0]), 33
    x, w = strided(wide(3, T, D_IN)).detach(), strided(narrow(2, r, D_IN)).detach()
    h, factor = narrow.constant(2, T, r), narrow.constant(2, r)
    chosen, narrow_w, narrow_h = x[slots].float(), w.float(), h.float()
    y = strided(wide(3, T, D_IN)).detach()
    expected = y.float().index_add(0, slots, narrow_h @ narrow_w)
    pairs = [
        (slot_products.triton_shrink(x, w, factor, slots), (chosen @ narrow_w.mT) * factor.float()[:, None, :]),
        (slot_products.triton_outer(h, x, slots), narrow_h.mT @ chosen),
        (slot_products.triton_expand(h, w.mT, y, y, slots), expected),
    ]
    for ours, theirs in pairs:
        assert root_mean_square_ratio(ours, theirs) <= TOLERANCE[wide_type]


def test_sums_do_not_depend_on_the_run() -> None:
    draw = Draw(0, torch.float32)
    h, x = draw.constant(2, 3 * slot_products.CHUNK_T + 5, 3), draw.constant(2, 3 * slot_products.CHUNK_T + 5, 17)
    assert torch.equal(slot_products.triton_outer(h, x, None), slot_products.triton_outer(h, x, None))
