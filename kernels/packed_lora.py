"""Packed LoRA: the low-rank update of K slots on one linear layer, alone or together with the frozen layer.

Letters: K slots in the batch, S slots that the adapter serves (S <= K), T tokens per slot, D_in, D_out features,
R rank (the largest of the slots).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from autopeft.kernels.counts import Count, Shape, expand_count, matmul_count, outer_count, shrink_count
from autopeft.kernels.slot_products import expand, expand_, outer, shrink


def packed_lora(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the update scale * (x A^T) B^T of every slot (Hu et al. 2021, section 4.1).

    x: [K, T, D_in], a: [K, R, D_in], b: [K, D_out, R], scale: [K], mask: [K, R] with 1 for the ranks that a
    slot owns (None: all). Returns [K, T, D_out] in x's type. Gradients: x, a, b; scale and mask are constants.
    """
    update: Tensor = _packed_lora(x, None, None, a, b, _factor(a, scale, mask), None)[0]
    return update


def packed_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Compute a frozen linear layer with the updates of some slots: x W^T + bias, and there + scale * (x A^T) B^T.

    x: [K, T, D_in], weight: [D_out, D_in], bias: [D_out], a: [S, R, D_in], b: [S, D_out, R], scale: [S],
    mask: [S, R], slots: [S] int64, the distinct slots that a, b, scale and mask belong to (None: S = K, all).
    Returns [K, T, D_out] in the type of the frozen product, the only tensor of that size that is made. a and b may be
    wider than weight and x: the update is then computed in their type and rounded when it is added.
    Gradients: x, a, b. weight and bias are frozen and get none; scale and mask are constants.
    """
    y: Tensor = _packed_lora(x, weight, bias, a, b, _factor(a, scale, mask), slots)[0]
    return y


def packed_lora_reference(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute `packed_lora` slot by slot in the obvious way."""
    out = []
    for k in range(x.shape[0]):
        owned = slice(None) if mask is None else mask[k].bool()
        delta = b[k][:, owned] @ a[k][owned]
        out.append(scale[k] * (x[k] @ delta.T))
    return torch.stack(out)


def packed_lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Compute `packed_lora_linear` slot by slot in the obvious way."""
    served = list(range(x.shape[0])) if slots is None else slots.tolist()
    out = []
    for k in range(x.shape[0]):
        effective = weight
        if k in served:
            i = served.index(k)
            owned = slice(None) if mask is None else mask[i].bool()
            effective = weight + scale[i] * (b[i][:, owned] @ a[i][owned])
        out.append(F.linear(x[k], effective, bias))
    return torch.stack(out)


def _factor(a: Tensor, scale: Tensor, mask: Tensor | None) -> Tensor:
    """Return [S, R]: scale where a slot owns the rank, else 0.

    On the narrow side it costs R numbers per token, not D_out.
    """
    factor = scale[:, None].expand(-1, a.shape[1]) if mask is None else scale[:, None] * mask
    return factor.detach().to(a.dtype)


# Both functions are one operation; without a weight it is the update alone. h = (x A^T) * factor [S, T, R] is saved for
# the gradient of B.


@torch.library.custom_op("autopeft::packed_lora", mutates_args=())
def _packed_lora(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, factor: Tensor, slots: Tensor | None
) -> tuple[Tensor, Tensor]:
    h = shrink(x, a, factor, slots)
    if weight is None:
        return expand(h, b, None, x.dtype), h
    y = F.linear(x.reshape(-1, x.shape[2]), weight, bias).view(*x.shape[:2], -1)
    return expand_(y, h, b, slots), h


@torch.library.custom_op("autopeft::packed_lora_backward", mutates_args=())
def _packed_lora_backward(
    gy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    factor: Tensor,
    slots: Tensor | None,
    h: Tensor,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (empty if nothing below is trained), a, and b transposed: [S, R, D_out]."""
    gh = shrink(gy, b.transpose(1, 2), factor, slots)
    ga, gb = outer(gh, x, slots), outer(h, gy, slots)
    if not needs_x:
        gx = x.new_empty(0)
    elif weight is None:
        gx = expand(gh, a.transpose(1, 2), None, x.dtype)
    else:
        gx = (gy.reshape(-1, gy.shape[2]) @ weight).view(x.shape)
        expand_(gx, gh, a.transpose(1, 2), slots)
    return gx, ga, gb


@_packed_lora.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, factor: Tensor, slots: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:2], b.shape[1]), a.new_empty(a.shape[0], x.shape[1], a.shape[1])


@_packed_lora_backward.register_fake
def _(
    gy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    factor: Tensor,
    slots: Tensor | None,
    h: Tensor,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape if needs_x else 0), a.new_empty(a.shape), b.new_empty(b.transpose(1, 2).shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, a, b, factor, slots = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, a, b, factor, slots, output[1])


@once_differentiable
def _backward(ctx: Any, gy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gx, ga, gb = _packed_lora_backward(gy, *ctx.saved_tensors, ctx.needs_input_grad[0])
    return gx if ctx.needs_input_grad[0] else None, None, None, ga, gb.transpose(1, 2), None, None


_packed_lora.register_autograd(_backward, setup_context=_setup_context)


def packed_lora_count(
    x: Shape,
    a: Shape,
    b: Shape,
    linear: bool,
    wide: torch.dtype = torch.bfloat16,
    narrow: torch.dtype = torch.float32,
) -> Count:
    """Count a forward pass from the shapes of x, a and b.

    linear: with the frozen layer; wide: x's type, narrow: a's.
    """
    (k, t, d_in), (s, r, _), d_out = x, a, b[1]
    update = shrink_count(s, t, d_in, r, wide, narrow) + expand_count(s, t, d_out, r, wide, narrow, base=linear)
    return update + matmul_count(k * t, d_in, d_out, wide) if linear else update


def packed_lora_backward_count(
    x: Shape,
    a: Shape,
    b: Shape,
    linear: bool,
    needs_x: bool = True,
    wide: torch.dtype = torch.bfloat16,
    narrow: torch.dtype = torch.float32,
) -> Count:
    """Count a backward pass, likewise. needs_x: something below is trained."""
    (k, t, d_in), (s, r, _), d_out = x, a, b[1]
    count = shrink_count(s, t, d_out, r, wide, narrow)
    count += outer_count(s, t, d_in, r, wide, narrow) + outer_count(s, t, d_out, r, wide, narrow)
    if needs_x:
        count += expand_count(s, t, d_in, r, wide, narrow, base=linear)
    return count + matmul_count(k * t, d_out, d_in, wide) if needs_x and linear else count


@register_flop_formula(torch.ops.autopeft.packed_lora)
def _flops(
    x: Shape,
    weight: Shape | None,
    bias: Shape | None,
    a: Shape,
    b: Shape,
    factor: Shape,
    slots: Shape | None,
    *,
    out_shape: Any = None,
) -> int:
    return packed_lora_count(x, a, b, linear=weight is not None).flops


@register_flop_formula(torch.ops.autopeft.packed_lora_backward)
def _flops_backward(
    gy: Shape,
    x: Shape,
    weight: Shape | None,
    a: Shape,
    b: Shape,
    factor: Shape,
    slots: Shape | None,
    h: Shape,
    needs_x: bool,
    *,
    out_shape: Any = None,
) -> int:
    return packed_lora_backward_count(x, a, b, weight is not None, needs_x).flops
