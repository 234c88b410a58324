"""The mixture of LoRA experts against its reference, both ways, and against what it is a case of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from autopeft.kernels import mixture_lora as module
from autopeft.kernels.mixture_lora import (
    is_routed,
    mixture_lora,
    mixture_lora_linear,
    mixture_lora_linear_reference,
    mixture_lora_reference,
)
from autopeft.kernels.packed_lora import packed_lora
from autopeft.kernels.slot_products import without_triton

from ..support.slow import slow
from .test_kernels import Draw, assert_same, root_mean_square_ratio

Op = Callable[..., Tensor]


def way(routed: bool, function: Op = mixture_lora) -> Op:
    """A function by one of its two ways, whatever the sizes. The routed way is PyTorch's alone."""

    def op(*args: Tensor | None) -> Tensor:
        with pytest.MonkeyPatch.context() as patch, without_triton() if routed else nullcontext():
            patch.setattr(module, "is_routed", lambda *_: routed)
            return function(*args)

    return op


DENSE, ROUTED = way(False), way(True)
LINEAR = {routed: way(routed, mixture_lora_linear) for routed in (False, True)}
WAYS = pytest.mark.parametrize("op", [DENSE, ROUTED], ids=["dense", "routed"])


def choices(draw: Draw, k: int, t: int, e: int, active: int) -> Tensor:
    """1 where a token has chosen an expert: [K, T, E]."""
    top = draw.constant(k, t, e).topk(min(active, e)).indices
    return torch.zeros(k, t, e, dtype=draw.dtype).scatter_(2, top, 1.0)


def gating(op: Op, chosen: Tensor) -> Op:
    """The operator of values that became gates by choice: what no token has chosen has no gradient."""
    return lambda x, a, b, values, *rest: op(x, a, b, values * chosen, *rest)


def masks(draw: Draw, k: int, e: int, r: int) -> Tensor:
    """Every expert of a slot owns its first ranks, at least one: [K, E, R]."""
    ranks = torch.randint(1, r + 1, (k, e, 1), generator=draw.generator)
    return (torch.arange(r) < ranks).to(draw.dtype)


@WAYS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("k", "e", "r", "active"), [(1, 1, 1, 1), (2, 1, 3, 1), (3, 5, 1, 2), (2, 4, 7, 2), (2, 3, 2, 3)]
)
def test_mixture_is_its_reference(op: Op, k: int, e: int, r: int, active: int, masked: bool) -> None:
    draw = Draw()
    x, a, b = draw.strided(k, 5, 11), draw(k, e, r, 11), draw(k, e, 9, r)
    values, chosen = draw.strided(k, 5, e), choices(draw, k, 5, e, active)
    args = (x, a, b, values, draw.scale(k), masks(draw, k, e, r) if masked else None)
    assert_same(gating(op, chosen), gating(mixture_lora_reference, chosen), draw, *args)


sizes = st.integers(1, 7)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([DENSE, ROUTED]), st.integers(1, 3), sizes, sizes, st.integers(1, 4), sizes, sizes, sizes)
def test_mixture_of_any_shape(op: Op, k: int, t: int, e: int, r: int, d_in: int, d_out: int, active: int) -> None:
    draw = Draw()
    x, a, b = draw(k, t, d_in), draw(k, e, r, d_in), draw(k, e, d_out, r)
    values, chosen = draw(k, t, e), choices(draw, k, t, e, active)
    args = (x, a, b, values, draw.scale(k), masks(draw, k, e, r))
    assert_same(gating(op, chosen), gating(mixture_lora_reference, chosen), draw, *args)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.booleans(), st.integers(1, 3), sizes, sizes, st.integers(1, 4), sizes, sizes, sizes)
def test_with_a_linear_of_any_shape(
    data: st.DataObject, routed: bool, s: int, t: int, e: int, r: int, d_in: int, d_out: int, active: int
) -> None:
    draw = Draw()
    slots = data.draw(st.none() | st.permutations(range(s + 2)).map(lambda order: torch.tensor(order[:s])))
    x, a, b = draw.strided(s if slots is None else s + 2, t, d_in), draw(s, e, r, d_in), draw(s, e, d_out, r)
    weight, bias = draw.constant(d_out, d_in), draw.constant(d_out) if data.draw(st.booleans()) else None
    values, chosen, scale, mask = draw(s, t, e), choices(draw, s, t, e, active), draw.scale(s), masks(draw, s, e, r)

    def op(x: Tensor, a: Tensor, b: Tensor, values: Tensor) -> Tensor:
        return LINEAR[routed](x, weight, bias, a, b, values * chosen, scale, mask, active, slots)

    def reference(x: Tensor, a: Tensor, b: Tensor, values: Tensor) -> Tensor:
        return mixture_lora_linear_reference(x, weight, bias, a, b, values * chosen, scale, mask, slots)

    assert_same(op, reference, draw, x, a, b, values)


@WAYS
def test_gradients_by_differences(op: Op) -> None:
    draw = Draw()
    x, a, b, values = draw(2, 3, 4), draw(2, 3, 2, 4), draw(2, 3, 5, 2), draw(2, 3, 3)
    chosen, scale, mask = choices(draw, 2, 3, 3, 2), draw.scale(2), masks(draw, 2, 3, 2)
    assert torch.autograd.gradcheck(gating(op, chosen), (x, a, b, values, scale, mask))


def test_only_all_experts_know_the_gradient_of_a_gate_of_zero() -> None:
    draw = Draw()
    x, a, b, scale = draw(2, 5, 7), draw(2, 4, 3, 7), draw(2, 4, 6, 3), draw.scale(2)
    chosen = choices(draw, 2, 5, 4, 2)
    gates = chosen.clone().requires_grad_()
    dense, routed, expected = (
        torch.autograd.grad(op(x, a, b, gates, scale).square().sum(), gates)[0]
        for op in (DENSE, ROUTED, mixture_lora_reference)
    )
    torch.testing.assert_close(dense, expected)
    assert (expected != 0).all()
    torch.testing.assert_close(routed, expected * chosen)


@WAYS
def test_nothing_chosen(op: Op) -> None:
    """By one token, by a whole slot, by all: zeros, and no gradient from there."""
    draw = Draw()
    x, a, b, values, scale = draw(2, 5, 7), draw(2, 4, 3, 7), draw(2, 4, 6, 3), draw(2, 5, 4), draw.scale(2)
    for nothing in ((0, 2), (1,), ()):
        chosen = choices(draw, 2, 5, 4, 2)
        chosen[nothing] = 0
        assert_same(gating(op, chosen), gating(mixture_lora_reference, chosen), draw, x, a, b, values, scale)
        assert not op(x, a, b, chosen, scale)[nothing].any()


@WAYS
@pytest.mark.parametrize("adapter_type", [torch.float32, torch.bfloat16])
def test_mixture_on_a_bfloat16_backbone(op: Op, adapter_type: torch.dtype) -> None:
    wide, narrow = Draw(0, torch.bfloat16), Draw(1, adapter_type)
    x, a, b, values = wide(2, 40, 33), narrow(2, 4, 5, 33), narrow(2, 4, 35, 5), narrow(2, 40, 4)
    chosen, scale, mask = choices(narrow, 2, 40, 4, 2), narrow.scale(2), masks(narrow, 2, 4, 5)
    leaves = [x, a, b, values]
    out = op(x, a, b, values * chosen, scale, mask)
    ours = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, *[adapter_type] * 3]
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    reference = mixture_lora_reference(*exact[:3], exact[3] * chosen, scale.float(), mask.float())
    expected = [reference, *torch.autograd.grad(reference, exact, torch.ones_like(reference))]
    for mine, theirs in zip(ours, expected, strict=True):
        assert root_mean_square_ratio(mine, theirs) <= 1e-2


ANY_SIZES = given(st.sampled_from([DENSE, ROUTED]), st.integers(1, 3), sizes, sizes, st.integers(1, 4))


@settings(max_examples=25, deadline=None)
@ANY_SIZES
def test_equal_gates_are_the_mean_of_loras(op: Op, k: int, t: int, e: int, r: int) -> None:
    draw = Draw()
    x, a, b, scale, mask = draw(k, t, 5), draw(k, e, r, 5), draw(k, e, 6, r), draw.scale(k), masks(draw, k, e, r)
    gates = torch.full((k, t, e), 1 / e, dtype=draw.dtype)

    def mean(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([packed_lora(x, a[:, i], b[:, i], scale, mask[:, i]) for i in range(e)]).mean(0)

    assert_same(lambda x, a, b: op(x, a, b, gates, scale, mask), mean, draw, x, a, b)
    same = a[:, :1].expand_as(a)
    averaged = packed_lora(x, a[:, 0], b.mean(1), scale)
    torch.testing.assert_close(op(x, same, b, gates, scale), averaged)


@settings(max_examples=25, deadline=None)
@ANY_SIZES
def test_an_expert_is_its_ranks_under_one_gate(op: Op, k: int, t: int, e: int, r: int) -> None:
    draw = Draw()
    x, a, b, values = draw(k, t, 5), draw(k, e, r, 5), draw(k, e, 6, r), draw(k, t, e)
    chosen, scale, mask = choices(draw, k, t, e, 2), draw.scale(k), masks(draw, k, e, r)

    def single_ranks(x: Tensor, a: Tensor, b: Tensor, gates: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
        a, b = a.reshape(k, e * r, 1, 5), b.transpose(2, 3).reshape(k, e * r, 6, 1)
        return op(x, a, b, gates.repeat_interleave(r, 2), scale, mask.view(k, e * r, 1))

    assert_same(gating(op, chosen), gating(single_ranks, chosen), draw, x, a, b, values, scale, mask)


@settings(max_examples=25, deadline=None)
@ANY_SIZES
def test_a_slot_alone_is_the_slot_in_a_pack(op: Op, k: int, t: int, e: int, r: int) -> None:
    draw = Draw()
    x, a, b, values = draw(k, t, 5), draw(k, e, r, 5), draw(k, e, 6, r), draw(k, t, e)
    chosen, scale, mask = choices(draw, k, t, e, 2), draw.scale(k), masks(draw, k, e, r)

    def alone(*args: Tensor) -> Tensor:
        return torch.cat([op(*(tensor[i : i + 1] for tensor in args)) for i in range(k)])

    assert_same(gating(op, chosen), gating(alone, chosen), draw, x, a, b, values, scale, mask)


@pytest.mark.parametrize("needs_x", [slow(False), True])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("layer", [False, True])
def test_mixture_is_a_proper_operator(layer: bool, routed: bool, needs_x: bool) -> None:
    draw = Draw(dtype=torch.float)
    x, a, b = draw(2 + layer, 5, 7).requires_grad_(needs_x), draw(2, 3, 4, 7), draw(2, 3, 9, 4)
    weight, bias = (draw.constant(9, 7), draw.constant(9)) if layer else (None, None)
    slots = torch.tensor([2, 0]) if layer else None
    if routed:  # the third expert of the first slot has no tokens
        gates, mask, h = draw(8), draw.constant(8, 4), draw.constant(8, 4)
        route = (torch.tensor([0, 2, 4, 1, 0, 3, 2, 4]), [3, 1, 0, 1, 2, 1], slots)
    else:
        gates, mask, h = draw(2, 5, 3), draw.constant(2, 1, 3, 4), draw.constant(2, 5, 3, 4)
        route = (None, [], slots)
    torch.library.opcheck(module._mixture_lora, (x, weight, bias, a, b, gates, mask, *route))
    rest = [tensor.detach() for tensor in (a, b, gates, mask)]
    gy = draw.constant(len(x), 5, 9)
    torch.library.opcheck(module._mixture_lora_backward, (gy, x.detach(), weight, *rest, *route, h, needs_x))


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize(("op", "pairs"), [(DENSE, 2 * 5 * 4), (ROUTED, 2 * 5 * 3)], ids=["dense", "routed"])
def test_what_is_computed_is_counted(op: Op, pairs: int, needs_x: bool) -> None:
    draw = Draw(dtype=torch.float)
    x, a, b = draw(2, 5, 7).requires_grad_(needs_x), draw(2, 4, 3, 7), draw(2, 4, 9, 3)
    with FlopCounterMode(display=False) as counter:
        out = op(x, a, b, choices(draw, 2, 5, 4, 3), draw.scale(2))
    assert counter.get_total_flops() == 2 * pairs * 3 * (7 + 9)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * 3 * (7 + 2 * 9 + (7 if needs_x else 0))


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize(("routed", "pairs"), [(False, 2 * 5 * 4), (True, 2 * 5 * 3)])
def test_the_linear_is_counted_too(routed: bool, pairs: int, needs_x: bool) -> None:
    draw = Draw(dtype=torch.float)
    x, a, b = draw(3, 5, 7).requires_grad_(needs_x), draw(2, 4, 3, 7), draw(2, 4, 9, 3)
    gates, slots = choices(draw, 2, 5, 4, 3), torch.tensor([2, 0])
    with FlopCounterMode(display=False) as counter:
        out = LINEAR[routed](x, draw.constant(9, 7), None, a, b, gates, draw.scale(2), None, 3, slots)
    assert counter.get_total_flops() == 2 * (3 * 5 * 7 * 9 + pairs * 3 * (7 + 9))
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    below = 3 * 5 * 7 * 9 + pairs * 3 * 7 if needs_x else 0
    assert counter.get_total_flops() == 2 * (below + pairs * 3 * (7 + 2 * 9))


def test_the_way_is_chosen_by_size() -> None:
    many = {"tokens": 800, "width": 2 * 384, "experts": 64, "rank": 8}
    assert is_routed(**many, active=2)
    assert not is_routed(**many, active=None)
    assert not is_routed(**many | {"tokens": 64}, active=2)
    assert not is_routed(**many | {"experts": 4}, active=2)
    draw = Draw(dtype=torch.float)
    x, a, b, scale = draw(1, 800, 384), draw(1, 64, 8, 384), draw(1, 64, 384, 8), draw.scale(1)
    for active, computed in ((2, 2), (None, 64)):
        with FlopCounterMode(display=False) as counter, without_triton():
            mixture_lora(x, a, b, choices(draw, 1, 800, 64, 2), scale, None, active)
        assert counter.get_total_flops() == 2 * 800 * computed * 8 * 2 * 384
