"""Mixture of LoRA experts: the routed low-rank updates of K slots on one linear layer, alone or with the frozen layer.

Letters: K slots in the batch, S slots that the mixture serves (S <= K), T tokens per slot, E experts, R rank of the
largest expert, D_in, D_out features; N chosen pairs of a token and an expert, in all slots together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from autopeft.kernels import slot_products
from autopeft.kernels.counts import Shape


def mixture_lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    gates: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    active: int | None = None,
) -> Tensor:
    """Sum gates * scale * (x A_e^T) B_e^T over the experts, in every slot.

    x: [K, T, D_in], a: [K, E, R, D_in], b: [K, E, D_out, R], gates: [K, T, E] with 0 where a token has not chosen an
    expert, scale: [K], mask: [K, E, R] with 1 for the ranks of an expert that a slot owns (None: all), active: the most
    experts that a token has chosen (None: all), by which the faster way is taken; both are right for any gates.
    Returns [K, T, D_out] in x's type; computed in that of a. Gradients: x, a, b, gates; scale and mask are constants.
    Routed, a gate of exactly 0 gets the gradient 0: gates come from a top-k, which has none for what it leaves out.
    """
    update: Tensor = _mixture_lora(x, None, None, a, b, *_routes(x, a, b, gates, scale, mask, active), None)[0]
    return update


def mixture_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    gates: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    active: int | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Compute a frozen linear layer with the mixtures of some slots: x W^T + bias, and there + `mixture_lora`.

    x: [K, T, D_in], weight: [D_out, D_in], bias: [D_out], a: [S, E, R, D_in], b: [S, E, D_out, R], gates: [S, T, E],
    scale: [S], mask: [S, E, R], slots: [S] int64, the distinct slots that these belong to (None: S = K, all).
    Returns [K, T, D_out] in the type of the frozen product. Gradients: x, a, b, gates; weight and bias are frozen.
    """
    y: Tensor = _mixture_lora(x, weight, bias, a, b, *_routes(x, a, b, gates, scale, mask, active), slots)[0]
    return y


def _routes(
    x: Tensor, a: Tensor, b: Tensor, gates: Tensor, scale: Tensor, mask: Tensor | None, active: int | None
) -> tuple[Tensor, Tensor | None, Tensor | None, list[int]]:
    """Return gates times scale, mask, tokens and counts in the layout, dense or routed, that is the faster one."""
    gates = gates.to(a.dtype) * scale.detach().to(a.dtype)[:, None, None]
    owned = None if mask is None else mask.detach().to(a.dtype)
    by_pytorch = x.is_cpu and not slot_products.by_triton(x, a)
    if not (by_pytorch and is_routed(x.shape[1], a.shape[3] + b.shape[2], a.shape[1], a.shape[2], active)):
        return gates, None if owned is None else owned[:, None], None, []
    # In the order of the groups, (slot, expert), which thereby needs no sort.
    chosen = (gates != 0).transpose(1, 2)
    slots, experts, tokens = chosen.nonzero(as_tuple=True)
    owned = None if owned is None else owned[slots, experts]
    return gates[slots, tokens, experts], owned, tokens, chosen.sum(2).flatten().tolist()


#: What the gathers and sums of a pair cost, and the calls of a group: in ranks, in products of one number.
PAIR_RANKS, GROUP_PRODUCTS = 36, 2**20


def is_routed(tokens: int, width: int, experts: int, rank: int, active: int | None) -> bool:
    """Whether the chosen experts alone are faster than all experts, on a CPU. width: D_in + D_out.

    The unit is the rank that a token could be multiplied with in the same time. Fitted to 232 forward and backward
    passes of both ways: 2 to 64 experts of rank 1 to 32, 1 to 4 active, 128 to 4096 tokens of 384 to 2048 features.
    There the chosen way takes 1.01 times the better one on average, all experts always 1.34 times and at worst 11
    times. It does not ask for the number of slots: a slot alone goes the way of its pack. Not measured on GPUs, which
    take all experts, as Triton does under its interpreter: groups one by one would leave most of a GPU idle.
    """
    if active is None:
        return False
    return experts * rank > active * (rank + PAIR_RANKS) + experts * GROUP_PRODUCTS / (tokens * width)


def mixture_lora_reference(
    x: Tensor, a: Tensor, b: Tensor, gates: Tensor, scale: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Compute `mixture_lora` slot by slot, token by token and expert by expert, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_, a, b, gates, scale = (tensor.to(wide) for tensor in (x, a, b, gates, scale))
    out = []
    for k in range(x.shape[0]):
        for t in range(x.shape[1]):
            update = x_.new_zeros(b.shape[2])
            for e in range(a.shape[1]):
                owned = slice(None) if mask is None else mask[k, e].bool()
                update = update + gates[k, t, e] * scale[k] * (b[k, e][:, owned] @ (a[k, e][owned] @ x_[k, t]))
            out.append(update)
    return torch.stack(out).view(*x.shape[:2], -1).to(x.dtype)


def mixture_lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    gates: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Compute `mixture_lora_linear`, the layer first and then every slot that is served."""
    served = list(range(x.shape[0])) if slots is None else slots.tolist()
    out = list(F.linear(x, weight, bias).unbind())
    for own, k in enumerate(served):
        part = slice(own, own + 1)
        owned = None if mask is None else mask[part]
        update = mixture_lora_reference(x[k : k + 1], a[part], b[part], gates[part], scale[part], owned)
        out[k] = out[k] + update[0]
    return torch.stack(out)


# One operation, by one of two ways that differ in their products only; without a weight it is the update alone.
# h = (x A_e^T) * mask is saved for the gradients of the gates and B; h * gates is computed again.
#
#          gates      mask          h             products
# dense    [S, T, E]  [S, 1, E, R]  [S, T, E, R]  of one LoRA of rank E * R: x is read once for all experts
# routed   [N]        [N, R]        [N, R]        of every group, a slot's expert, with the tokens [N] that chose it
#
# tokens: [N] in the order of the groups, None where dense; counts: pairs of each of the S * E groups.


@torch.library.custom_op("autopeft::mixture_lora", mutates_args=())
def _mixture_lora(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    gates: Tensor,
    mask: Tensor | None,
    tokens: Tensor | None,
    counts: Sequence[int],
    slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    base = None
    if weight is not None:
        base = F.linear(x.reshape(-1, x.shape[2]), weight, bias).view(*x.shape[:2], -1)
    h = _shrink(x, a, tokens, counts, slots)
    if mask is not None:
        h.mul_(mask)
    return _expand(h * gates[..., None], b.transpose(2, 3), base, x, tokens, counts, slots), h


@torch.library.custom_op("autopeft::mixture_lora_backward", mutates_args=())
def _mixture_lora_backward(
    gy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    gates: Tensor,
    mask: Tensor | None,
    tokens: Tensor | None,
    counts: Sequence[int],
    slots: Tensor | None,
    h: Tensor,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x (empty if nothing below is trained), a, b transposed: [S, E, R, D_out], and gates."""
    where = (tokens, counts, slots)
    gb = _outer(h * gates[..., None], gy, a, *where)
    gh = _shrink(gy, b.transpose(2, 3), *where)
    g_gates = (gh * h).sum(-1)
    gh.mul_(gates[..., None])
    if mask is not None:
        gh.mul_(mask)
    ga = _outer(gh, x, a, *where)
    if not needs_x:
        return x.new_empty(0), ga, gb, g_gates
    base = None if weight is None else (gy.reshape(-1, gy.shape[2]) @ weight).view(x.shape)
    return _expand(gh, a, base, x, *where), ga, gb, g_gates


def _shrink(x: Tensor, w: Tensor, tokens: Tensor | None, counts: Sequence[int], slots: Tensor | None) -> Tensor:
    """Return h = x w_e^T of every pair. x: [K, T, D], w: [S, E, R, D]."""
    if tokens is None:
        narrow = slot_products.shrink(x, w.flatten(1, 2), slots=slots)
        return narrow.view(*narrow.shape[:2], *w.shape[1:3])
    h = w.new_empty(len(tokens), w.shape[2])
    for k, own, rows, w_e in _groups(h, w, tokens, counts, slots):
        torch.mm(x[k].index_select(0, own).to(w.dtype), w_e.T, out=rows)
    return h


def _expand(
    h: Tensor,
    w: Tensor,
    base: Tensor | None,
    x: Tensor,
    tokens: Tensor | None,
    counts: Sequence[int],
    slots: Tensor | None,
) -> Tensor:
    """Sum h w_e over the experts of every token. w: [S, E, R, D].

    The sum is added in place to `base` [K, T, D] if there is one; otherwise it is a new [S, T, D] in the type of x,
    which has T tokens too.
    """
    if tokens is None:
        narrow, wide = h.flatten(2), w.flatten(1, 2).transpose(1, 2)
        if base is None:
            return slot_products.expand(narrow, wide, None, x.dtype)
        return slot_products.expand_(base, narrow, wide, slots)
    y = h.new_zeros(len(w), x.shape[1], w.shape[3]) if base is None else base
    for k, own, rows, w_e in _groups(h, w, tokens, counts, slots):
        y[k].index_add_(0, own, (rows @ w_e).to(y.dtype))
    return y.to(x.dtype)


def _outer(
    h: Tensor, x: Tensor, a: Tensor, tokens: Tensor | None, counts: Sequence[int], slots: Tensor | None
) -> Tensor:
    """Sum every expert's h^T x over its tokens. x: [K, T, D], a: [S, E, R, D_in]; returns [S, E, R, D] in h's type."""
    shape = (*a.shape[:3], x.shape[2])
    if tokens is None:
        return slot_products.outer(h.flatten(2), x, slots).view(shape)
    g = h.new_empty(shape)  # 0 for an expert without tokens: so `mm` fills the product of nothing
    for k, own, rows, g_e in _groups(h, g, tokens, counts, slots):
        torch.mm(rows.T, x[k].index_select(0, own).to(h.dtype), out=g_e)
    return g


def _groups(
    h: Tensor, w: Tensor, tokens: Tensor, counts: Sequence[int], slots: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield of every slot and expert: place in the batch, tokens that chose it, their rows of h [N, R], and w[s, e].

    Group by group, gathered rows are still in the cache when they are multiplied, and there is no tensor of N rows of
    D. `torch.nn.functional.grouped_mm` needs that one, was faster only with 64 experts of 384 features, and takes
    neither float64 nor rows that are no multiple of 16 bytes.
    """
    matrices = w.flatten(0, 1).unbind()
    served = range(len(w)) if slots is None else slots.tolist()
    for group, (own, rows, matrix) in enumerate(zip(tokens.split(counts), h.split(counts), matrices, strict=True)):
        yield served[group // w.shape[1]], own, rows, matrix


@_mixture_lora.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    gates: Tensor,
    mask: Tensor | None,
    tokens: Tensor | None,
    counts: Sequence[int],
    slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:2], b.shape[2]), a.new_empty(*gates.shape, a.shape[2])


@_mixture_lora_backward.register_fake
def _(
    gy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    gates: Tensor,
    mask: Tensor | None,
    tokens: Tensor | None,
    counts: Sequence[int],
    slots: Tensor | None,
    h: Tensor,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gx = x.new_empty(x.shape if needs_x else 0)
    return gx, a.new_empty(a.shape), b.new_empty(b.transpose(2, 3).shape), gates.new_empty(gates.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, a, b, gates, mask, tokens, ctx.counts, slots = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, a, b, gates, mask, tokens, slots, output[1])


@once_differentiable
def _backward(ctx: Any, gy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_x = ctx.needs_input_grad[0]
    *tensors, slots, h = ctx.saved_tensors
    gx, ga, gb, g_gates = _mixture_lora_backward(gy, *tensors, ctx.counts, slots, h, needs_x)
    return gx if needs_x else None, None, None, ga, gb.transpose(2, 3), g_gates, *[None] * 4


_mixture_lora.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.autopeft.mixture_lora)
def _flops(
    x: Shape,
    weight: Shape | None,
    bias: Shape | None,
    a: Shape,
    b: Shape,
    gates: Shape,
    mask: Shape | None,
    tokens: Shape | None,
    counts: Sequence[int],
    slots: Shape | None,
    *,
    out_shape: Any = None,
) -> int:
    frozen = x[0] * x[1] * math.prod(weight) if weight else 0
    return 2 * (frozen + math.prod(gates) * a[2] * (a[3] + b[2]))


@register_flop_formula(torch.ops.autopeft.mixture_lora_backward)
def _flops_backward(
    gy: Shape,
    x: Shape,
    weight: Shape | None,
    a: Shape,
    b: Shape,
    gates: Shape,
    mask: Shape | None,
    tokens: Shape | None,
    counts: Sequence[int],
    slots: Shape | None,
    h: Shape,
    needs_x: bool,
    *,
    out_shape: Any = None,
) -> int:
    frozen = x[0] * x[1] * math.prod(weight) if weight and needs_x else 0
    return 2 * (frozen + math.prod(gates) * a[2] * ((a[3] if needs_x else 0) + a[3] + 2 * b[2]))
