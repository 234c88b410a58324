"""Mixture of LoRA experts: the routed low-rank updates of K slots.

Letters: K slots, T tokens per slot, E experts, R rank of the largest expert, D_in, D_out features; N chosen pairs of a
token and an expert, in all slots together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from autopeft.kernels import slot_products


def mixture_lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    gates: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    active: int | None = None,
) -> Tensor:
    """The sum over experts of gates * scale * (x A_e^T) B_e^T, in every slot.

    x: [K, T, D_in], a: [K, E, R, D_in], b: [K, E, D_out, R], gates: [K, T, E] with 0 where a token has not chosen an
    expert, scale: [K], mask: [K, E, R] with 1 for the ranks of an expert that a slot owns (None: all), active: the most
    experts that a token has chosen (None: all), by which the faster way is taken; both are right for any gates.
    Returns [K, T, D_out] in x's type; computed in that of a. Gradients: x, a, b, gates; scale and mask are constants.
    Routed, a gate of exactly 0 gets the gradient 0: gates come from a top-k, which has none for what it leaves out.
    """
    factor = scale[:, None, None].expand(a.shape[:3]) if mask is None else scale[:, None, None] * mask
    factor, gates = factor.detach().to(a.dtype), gates.to(a.dtype)
    if not (x.is_cpu and is_routed(x.shape[1], a.shape[3] + b.shape[2], a.shape[1], a.shape[2], active)):
        return _mixture_lora(x, a, b, gates, factor[:, None], None, [])[0]
    # In the order of the groups, (slot, expert), which thereby needs no sort.
    chosen = (gates != 0).transpose(1, 2)
    slots, experts, tokens = chosen.nonzero(as_tuple=True)
    counts = chosen.sum(2).flatten().tolist()
    return _mixture_lora(x, a, b, gates[slots, tokens, experts], factor[slots, experts], tokens, counts)[0]


#: What the gathers and sums of a pair cost, and the calls of a group: in ranks, in products of one number.
PAIR_RANKS, GROUP_PRODUCTS = 36, 2**20


def is_routed(tokens: int, width: int, experts: int, rank: int, active: int | None) -> bool:
    """Whether the chosen experts alone are faster than all experts, on a CPU. width: D_in + D_out.

    In the ranks that a token could be multiplied with in the same time. Fitted to 232 forward and backward passes of
    both ways: 2 to 64 experts of rank 1 to 32, 1 to 4 active, 128 to 4096 tokens of 384 to 2048 features. There the
    chosen way takes 1.01 times the better one on average, all experts always 1.34 times and at worst 11 times. It does
    not ask for the number of slots: a slot alone goes the way of its pack. Not measured on GPUs, which take all
    experts: groups one by one would leave most of one idle.
    """
    if active is None:
        return False
    return experts * rank > active * (rank + PAIR_RANKS) + experts * GROUP_PRODUCTS / (tokens * width)


def mixture_lora_reference(
    x: Tensor, a: Tensor, b: Tensor, gates: Tensor, scale: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The same, slot by slot, token by token and expert by expert, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_, a, b, gates, scale = (tensor.to(wide) for tensor in (x, a, b, gates, scale))
    out = []
    for k in range(x.shape[0]):
        for t in range(x.shape[1]):
            update = x_.new_zeros(b.shape[2])
            for e in range(a.shape[1]):
                kept = slice(None) if mask is None else mask[k, e].bool()
                update = update + gates[k, t, e] * scale[k] * (b[k, e][:, kept] @ (a[k, e][kept] @ x_[k, t]))
            out.append(update)
    return torch.stack(out).view(*x.shape[:2], -1).to(x.dtype)


# One operation, by one of two ways that differ in their products only. h = (x A_e^T) * factor is kept for the gradients
# of the gates and B; what the gates make of it is computed again.
#
#          gates      factor        h             products
# dense    [K, T, E]  [K, 1, E, R]  [K, T, E, R]  of one LoRA of rank E * R: x is read once for all experts
# routed   [N]        [N, R]        [N, R]        of every group, a slot's expert, with the tokens [N] that chose it
#
# tokens: [N] in the order of the groups, None where dense; counts: pairs of each of the K * E groups.


@torch.library.custom_op("autopeft::mixture_lora", mutates_args=())
def _mixture_lora(
    x: Tensor, a: Tensor, b: Tensor, gates: Tensor, factor: Tensor, tokens: Tensor | None, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    h = _shrink(x, a, tokens, counts).mul_(factor)
    return _expand(h * gates[..., None], b.transpose(2, 3), x, tokens, counts), h


@torch.library.custom_op("autopeft::mixture_lora_backward", mutates_args=())
def _mixture_lora_backward(
    gy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    gates: Tensor,
    factor: Tensor,
    tokens: Tensor | None,
    counts: Sequence[int],
    h: Tensor,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (empty if nothing below is trained), a, b transposed: [K, E, R, D_out], and gates."""
    experts = a.shape[1]
    gb = _outer(h * gates[..., None], gy, experts, tokens, counts)
    gh = _shrink(gy, b.transpose(2, 3), tokens, counts)
    g_gates = (gh * h).sum(-1)
    gh.mul_(gates[..., None]).mul_(factor)
    ga = _outer(gh, x, experts, tokens, counts)
    return _expand(gh, a, x, tokens, counts) if needs_x else x.new_empty(0), ga, gb, g_gates


def _shrink(x: Tensor, w: Tensor, tokens: Tensor | None, counts: Sequence[int]) -> Tensor:
    """x w_e^T of every pair. x: [K, T, D], w: [K, E, R, D]; returns h."""
    experts, rank = w.shape[1:3]
    if tokens is None:
        return slot_products.shrink(x, w.flatten(1, 2)).view(*x.shape[:2], experts, rank)
    h = w.new_empty(len(tokens), rank)
    for k, own, rows, w_e in _groups(h, w, tokens, counts):
        torch.mm(x[k].index_select(0, own).to(w.dtype), w_e.T, out=rows)
    return h


def _expand(h: Tensor, w: Tensor, x: Tensor, tokens: Tensor | None, counts: Sequence[int]) -> Tensor:
    """Every token's sum of h w_e. w: [K, E, R, D]; returns [K, T, D] in the type of x, which has T tokens too."""
    if tokens is None:
        return slot_products.expand(h.flatten(2), w.flatten(1, 2).transpose(1, 2), None, x.dtype)
    y = h.new_zeros(*x.shape[:2], w.shape[3])
    for k, own, rows, w_e in _groups(h, w, tokens, counts):
        y[k].index_add_(0, own, rows @ w_e)
    return y.to(x.dtype)


def _outer(h: Tensor, x: Tensor, experts: int, tokens: Tensor | None, counts: Sequence[int]) -> Tensor:
    """Every expert's h^T x, summed over its tokens. x: [K, T, D]; returns [K, E, R, D] in h's type."""
    shape = (len(x), experts, h.shape[-1], x.shape[2])
    if tokens is None:
        return slot_products.outer(h.flatten(2), x).view(shape)
    g = h.new_empty(shape)  # 0 for an expert without tokens: so `mm` fills the product of nothing
    for k, own, rows, g_e in _groups(h, g, tokens, counts):
        torch.mm(rows.T, x[k].index_select(0, own).to(h.dtype), out=g_e)
    return g


def _groups(
    h: Tensor, w: Tensor, tokens: Tensor, counts: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Of every slot and expert: the slot, the tokens that chose the expert, their rows of h [N, R], and w[k, e].

    Group by group, gathered rows are still in the cache when they are multiplied, and there is no tensor of N rows of
    D. `torch.nn.functional.grouped_mm` needs that one, was faster only with 64 experts of 384 features, and takes
    neither float64 nor rows that are no multiple of 16 bytes.
    """
    matrices = w.flatten(0, 1).unbind()
    for group, (own, rows, matrix) in enumerate(zip(tokens.split(counts), h.split(counts), matrices, strict=True)):
        yield group // w.shape[1], own, rows, matrix


@_mixture_lora.register_fake
def _(x, a, b, gates, factor, tokens, counts):
    return x.new_empty(*x.shape[:2], b.shape[2]), a.new_empty(*gates.shape, a.shape[2])


@_mixture_lora_backward.register_fake
def _(gy, x, a, b, gates, factor, tokens, counts, h, needs_x):
    gx = x.new_empty(x.shape if needs_x else 0)
    return gx, a.new_empty(a.shape), b.new_empty(b.transpose(2, 3).shape), gates.new_empty(gates.shape)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    *tensors, ctx.counts = inputs
    ctx.save_for_backward(*tensors, output[1])


@once_differentiable
def _backward(ctx, gy, _):
    needs_x = ctx.needs_input_grad[0]
    *tensors, h = ctx.saved_tensors
    gx, ga, gb, g_gates = _mixture_lora_backward(gy, *tensors, ctx.counts, h, needs_x)
    return gx if needs_x else None, ga, gb.transpose(2, 3), g_gates, None, None, None


_mixture_lora.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.autopeft.mixture_lora)
def _flops(x, a, b, gates, factor, tokens, counts, *, out_shape=None):
    return 2 * math.prod(gates) * a[2] * (a[3] + b[2])


@register_flop_formula(torch.ops.autopeft.mixture_lora_backward)
def _flops_backward(gy, x, a, b, gates, factor, tokens, counts, h, needs_x, *, out_shape=None):
    return 2 * math.prod(gates) * a[2] * ((a[3] if needs_x else 0) + a[3] + 2 * b[2])
