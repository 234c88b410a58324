"""The mixture of LoRA experts through the Triton kernels, under Triton's interpreter: all experts as one LoRA."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import torch
from torch.utils.flop_counter import FlopCounterMode

from autopeft.kernels.mixture_lora import (
    mixture_lora,
    mixture_lora_linear,
    mixture_lora_linear_reference,
    mixture_lora_reference,
)

from ..test_kernels import Draw
from ..test_mixture_lora import choices, masks
from .test_packed_lora import TOLERANCE, TYPES, T, assert_close, poisoned, strided  # noqa: F401

D_IN, D_OUT = 67, 35


@TYPES
@pytest.mark.parametrize(("experts", "rank"), [(1, 3), (5, 4)])
@pytest.mark.parametrize("linear", [False, True])
def test_mixture(experts: int, rank: int, wide_type: torch.dtype, narrow_type: torch.dtype, linear: bool) -> None:
    wide, narrow, slots = Draw(0, wide_type), Draw(1, narrow_type), torch.tensor([2, 0])
    x, a, b = (
        strided(wide(3 if linear else 2, T, D_IN)),
        narrow(2, experts, rank, D_IN),
        narrow(2, experts, D_OUT, rank),
    )
    gates = (choices(narrow, 2, T, experts, 2) * narrow.constant(2, T, experts)).requires_grad_()
    rest = (gates, narrow.scale(2), masks(narrow, 2, experts, rank))
    tolerance = TOLERANCE[wide_type] * (2 if narrow_type.itemsize == 2 else 1)  # gates are rounded on the way
    if not linear:
        args = (x, a, b, *rest)
        assert_close(mixture_lora, mixture_lora_reference, [x, a, b, gates], *args, tolerance=tolerance)
        return
    args = (x, wide.constant(D_OUT, D_IN), None, a, b, *rest)
    assert_close(
        lambda *args: mixture_lora_linear(*args, slots=slots),
        lambda *args: mixture_lora_linear_reference(*args, slots=slots),
        [x, a, b, gates], *args, tolerance=tolerance,
    )  # fmt: skip


def test_all_experts_are_taken_at_any_size() -> None:
    """As on a GPU, where PyTorch would take those chosen alone on a CPU."""
    draw = Draw(0, torch.float32)
    x, a, b = draw(1, 200, 64), draw(1, 64, 8, 64), draw(1, 64, 64, 8)
    gates = choices(draw, 1, 200, 64, 1)
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr("autopeft.kernels.mixture_lora.is_routed", lambda *_: True)
        mixture_lora(x, a, b, gates, draw.scale(1), None, 1)
    assert counter.get_total_flops() == 2 * 200 * 64 * 8 * 128
