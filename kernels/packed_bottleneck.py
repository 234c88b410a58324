"""Packed bottleneck adapters: the two-layer networks of K slots at one sub-layer.

Letters: K slots, T tokens per slot, D_z features that the down-projection reads, D features of the output,
R units (the largest of the slots).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from autopeft.kernels.counts import Shape
from autopeft.kernels.slot_products import expand, outer, shrink

#: Activations and, from their input s and the gradient g of their output, the gradient of s.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (torch.relu, lambda g, s: g * (s > 0)),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "tanh": (torch.tanh, lambda g, s: g * (1.0 - s.tanh().square())),
    "none": (lambda s: s, lambda g, s: g),
}


def packed_bottleneck(
    z: Tensor,
    y: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    activation: str,
) -> Tensor:
    """Compute y + scale * (act(z W_down^T + b_down) W_up^T + b_up) in every slot (Houlsby et al. 2019, section 2.1).

    z: [K, T, D_z], y: [K, T, D] (z itself: the serial form; None: the update alone), down: [K, R, D_z],
    down_bias: [K, R], up: [K, D, R], up_bias: [K, D], scale: [K], mask: [K, R] with 1 for the units that a slot owns
    (None: all), activation: a key of `ACTIVATIONS` (gelu is exact). Returns [K, T, D] in the type of y, else of z;
    computed in that of down. Gradients: z, y and the projections; scale and mask are constants.
    """
    scale = scale[:, None]
    # The bias of the up-projection is the weight of a last unit that is always one: it takes no pass over [K, T, D]
    # of its own, forward or backward.
    units = scale.expand(-1, down.shape[1]) if mask is None else scale * mask
    factor = torch.cat([units, scale], dim=1).detach().to(down.dtype)
    serial = y is z
    base = None if serial else y
    out: Tensor = _packed_bottleneck(z, base, down, down_bias, up, up_bias, factor, activation, serial)[0]
    return out


def packed_bottleneck_reference(
    z: Tensor,
    y: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    activation: str,
) -> Tensor:
    """Compute `packed_bottleneck` slot by slot in the obvious way."""
    act = torch.nn.Identity() if activation == "none" else getattr(F, activation)
    out = []
    for k in range(z.shape[0]):
        owned = slice(None) if mask is None else mask[k].bool()
        h = act(F.linear(z[k], down[k][owned], down_bias[k][owned]))
        update = scale[k] * F.linear(h, up[k][:, owned], up_bias[k])
        out.append(update if y is None else y[k] + update)
    return torch.stack(out)


# s = z W_down^T + b_down [K, T, R] is saved; the rest of the narrow side is computed again from it.
# `serial`: z is added to the update and not y. Its gradient is then one tensor, not the sum of two.


@torch.library.custom_op("autopeft::packed_bottleneck", mutates_args=())
def _packed_bottleneck(
    z: Tensor,
    y: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    factor: Tensor,
    activation: str,
    serial: bool,
) -> tuple[Tensor, Tensor]:
    s = shrink(z, down).add_(down_bias[:, None, :])
    base = z if serial else y
    weights = torch.cat([up, up_bias[:, :, None]], dim=2)
    return expand(_units(s, factor, activation), weights, base, (z if base is None else base).dtype), s


def _units(s: Tensor, factor: Tensor, activation: str) -> Tensor:
    """Return [K, T, R + 1], the input of the up-projection and its bias."""
    h = s.new_ones(*s.shape[:2], s.shape[2] + 1)
    # Masked after the activation: a unit that a slot does not own has a bias in the bank.
    h[..., :-1] = ACTIVATIONS[activation][0](s)
    return h.mul_(factor[:, None, :])


@torch.library.custom_op("autopeft::packed_bottleneck_backward", mutates_args=())
def _packed_bottleneck_backward(
    gy: Tensor,
    z: Tensor,
    down: Tensor,
    up: Tensor,
    factor: Tensor,
    s: Tensor,
    activation: str,
    serial: bool,
    needs_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of z (empty: nothing below is trained), down, down_bias, up with its bias: [K, R + 1, D]."""
    gh = shrink(gy, up.transpose(1, 2), factor[:, :-1])
    gs = ACTIVATIONS[activation][1](gh, s)
    g_up = outer(_units(s, factor, activation), gy)
    gz = z.new_empty(0)
    if needs_z:
        gz = expand(gs, down.transpose(1, 2), gy if serial else None, z.dtype)
    return gz, outer(gs, z), gs.sum(1), g_up


@_packed_bottleneck.register_fake
def _(
    z: Tensor,
    y: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    factor: Tensor,
    activation: str,
    serial: bool,
) -> tuple[Tensor, Tensor]:
    shape = (*z.shape[:2], up.shape[1])
    return (z if y is None else y).new_empty(shape), down.new_empty(*z.shape[:2], down.shape[1])


@_packed_bottleneck_backward.register_fake
def _(
    gy: Tensor,
    z: Tensor,
    down: Tensor,
    up: Tensor,
    factor: Tensor,
    s: Tensor,
    activation: str,
    serial: bool,
    needs_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, d, r = up.shape
    gz = z.new_empty(z.shape if needs_z else 0)
    return gz, down.new_empty(down.shape), down.new_empty(k, r), up.new_empty(k, r + 1, d)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, _, down, _, up, _, factor, ctx.activation, ctx.serial = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z, down, up, factor, output[1])


@once_differentiable
def _backward(ctx: Any, gy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_z, needs_y = ctx.needs_input_grad[:2]
    gz, g_down, g_down_bias, g_up = _packed_bottleneck_backward(
        gy, *ctx.saved_tensors, ctx.activation, ctx.serial, needs_z
    )
    g_up, g_up_bias = g_up[:, :-1].transpose(1, 2), g_up[:, -1]
    return gz if needs_z else None, gy if needs_y else None, g_down, g_down_bias, g_up, g_up_bias, None, None, None


_packed_bottleneck.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.autopeft.packed_bottleneck)
def _flops(
    z: Shape,
    y: Shape | None,
    down: Shape,
    down_bias: Shape,
    up: Shape,
    up_bias: Shape,
    factor: Shape,
    activation: str,
    serial: bool,
    *,
    out_shape: Any = None,
) -> int:
    (k, t, d_z), (_, d, r) = z, up
    return 2 * k * t * r * (d_z + d)


@register_flop_formula(torch.ops.autopeft.packed_bottleneck_backward)
def _flops_backward(
    gy: Shape,
    z: Shape,
    down: Shape,
    up: Shape,
    factor: Shape,
    s: Shape,
    activation: str,
    serial: bool,
    needs_z: bool,
    *,
    out_shape: Any = None,
) -> int:
    (k, t, d_z), (_, d, r) = z, up
    return 2 * k * t * r * ((d_z if needs_z else 0) + d_z + 2 * d)
