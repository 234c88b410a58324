"""The packed bottleneck through its Triton kernels, under Triton's interpreter."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import torch

from autopeft.kernels.packed_bottleneck import ACTIVATIONS, packed_bottleneck, packed_bottleneck_reference

from ..test_kernels import Draw, mask_of
from .test_packed_lora import RANKS, TOLERANCE, TYPES, T, assert_close, poisoned, strided  # noqa: F401

D_Z, D = 35, 67


@TYPES
@RANKS
@pytest.mark.parametrize("form", ["serial", "parallel", "update alone"])
def test_bottleneck(ranks: tuple[int, ...], wide_type: torch.dtype, narrow_type: torch.dtype, form: str) -> None:
    check(ranks, wide_type, narrow_type, form, "silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    check((2, 3), torch.float32, torch.float32, "parallel", activation)


def check(ranks: tuple[int, ...], wide_type: torch.dtype, narrow_type: torch.dtype, form: str, activation: str) -> None:
    k, r, wide, narrow = len(ranks), max(ranks), Draw(0, wide_type), Draw(1, narrow_type)
    d_z = D if form == "serial" else D_Z
    z = strided(wide(k, T, d_z))
    y = {"serial": lambda: z, "parallel": lambda: strided(wide(k, T, D)), "update alone": lambda: None}[form]()
    weights = [0.3 * narrow.constant(*shape) for shape in ((k, r, d_z), (k, r), (k, D, r), (k, D))]
    leaves = [z, *([y] if form == "parallel" else []), *(weight.requires_grad_() for weight in weights)]
    args = (z, y, *weights, narrow.scale(k), mask_of(ranks, narrow_type), activation)
    functions = (packed_bottleneck, packed_bottleneck_reference)
    assert_close(*functions, leaves, *args, tolerance=TOLERANCE[wide_type])
