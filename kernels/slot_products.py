"""The three products of which every packed adapter is made, forward and backward.

An adapter is narrow in the middle, so with w a down-projection or a transposed up-projection:

    shrink   h = x w^T      [K, T, D] to [S, T, R]
    expand   y = h w^T      [S, T, R] to [S, T, D] or added in place to the slots of a [K, T, D]
    outer    g = h^T x      [S, T, R], [K, T, D] to [S, R, D], the gradient of a projection

Letters: K slots in the batch, S slots that the adapter serves (`slots` [S]: which, distinct; None: all K, in order),
T tokens per slot, D features (wide), R rank (narrow, the largest of the slots). Products are taken in the adapter's
type, that of w or h; the wide tensors may have another. Any tensor may be strided.

PyTorch serves CPUs, Triton serves CUDA tensors. Where the types agree (with Triton, always) no wide tensor is made
beside the result: copies of these, not operations, are what a pack waits for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # there is none for this platform
    triton = None

#: Types that the Triton kernels take; float64 is for checking gradients and stays with PyTorch.
TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def shrink(x: Tensor, w: Tensor, factor: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
    """h = (x[slots] w^T) * factor. x: [K, T, D], w: [S, R, D], factor: [S, R]; returns [S, T, R] in w's type."""
    if by_triton(x, w):
        return triton_shrink(x, w, factor, slots)
    if slots is None:
        h = torch.bmm(x.to(w.dtype), w.transpose(1, 2))
    else:
        h = w.new_empty(len(slots), x.shape[1], w.shape[1])
        for i, k in enumerate(slots.tolist()):
            torch.mm(x[k].to(w.dtype), w[i].T, out=h[i])
    return h if factor is None else h.mul_(factor[:, None, :])


def expand(h: Tensor, w: Tensor, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y = base + h w^T as a new tensor. h: [K, T, R], w: [K, D, R], base: [K, T, D]; returns [K, T, D] in `dtype`."""
    if by_triton(h, w):
        return triton_expand(h, w, base, _empty((*h.shape[:2], w.shape[1]), dtype, h.device))
    if base is None:
        return torch.bmm(h, w.transpose(1, 2)).to(dtype)
    if base.dtype == h.dtype:
        return torch.baddbmm(base, h, w.transpose(1, 2)).to(dtype)
    return torch.bmm(h, w.transpose(1, 2)).add_(base).to(dtype)


def expand_(y: Tensor, h: Tensor, w: Tensor, slots: Tensor | None = None) -> Tensor:
    """y[slots] += h w^T in place. y: [K, T, D], h: [S, T, R], w: [S, D, R]; returns y."""
    if by_triton(h, w):
        return triton_expand(h, w, y, y, slots)
    if slots is None and y.dtype == h.dtype:
        return y.baddbmm_(h, w.transpose(1, 2))  # 5 to 10 % less time than the loop, more where T is small
    served: Iterable[int] = range(len(y)) if slots is None else slots.tolist()
    for i, k in enumerate(served):
        if y.dtype == h.dtype:
            y[k].addmm_(h[i], w[i].T)
        else:
            y[k].add_(h[i] @ w[i].T)  # rounded once, to y's type
    return y


def outer(h: Tensor, x: Tensor, slots: Tensor | None = None) -> Tensor:
    """g = h^T x[slots], summed over tokens. h: [S, T, R], x: [K, T, D]; returns [S, R, D] in h's type.

    For [S, D, R] transpose the result: the product x^T h takes a CPU twice the time.
    """
    if by_triton(x, h):
        return triton_outer(h, x, slots)
    if slots is None:
        return torch.bmm(h.transpose(1, 2), x.to(h.dtype))
    g = h.new_empty(len(h), h.shape[2], x.shape[2])
    for i, k in enumerate(slots.tolist()):
        torch.mm(h[i].T, x[k].to(h.dtype), out=g[i])
    return g


def by_triton(*tensors: Tensor) -> bool:
    return all(t.is_cuda and t.dtype in TRITON_TYPES for t in tensors) and triton is not None


# Triton. Offsets are int64: K * T * D passes 2^31 in a large pack. A mask on loads pads every size to its block, so
# that no size is a constant of the compiled kernel.

#: The interpreter computes a bfloat16 `tl.dot` wrongly, without a word: there operands are widened first.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
#: Tokens, features and ranks of a program: the largest with which no kernel spills registers on sm_90. Chosen and not
#: tuned; an autotuner would go here.
BLOCK_T, BLOCK_D, MAX_BLOCK_R = 32, 64, 32
#: Tokens that one program of `outer` sums, a multiple of BLOCK_T.
CHUNK_T = 512

# Without Triton the kernels are plain functions that nobody calls.
jit: Any = (lambda kernel: kernel) if triton is None else triton.jit


@jit
def _dot(a, b, acc, INTERPRET: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a b. float32 stays float32 ("ieee"): with tf32 a pack would not be the slot alone on a CPU, and narrow
    products wait for memory anyway."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def _shrink_kernel(  # type: ignore[no-untyped-def]
    x, w, factor, slots, h, T, D, R,
    x_k, x_t, x_d, w_s, w_r, w_d,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (block of T, block of R, slot). h: [S, T, R], contiguous."""
    s = tl.program_id(2).to(tl.int64)
    k = s if slots is None else tl.load(slots + s)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        x_at = x + k * x_k + t[:, None] * x_t + d[None, :] * x_d
        w_at = w + s * w_s + r[None, :] * w_r + d[:, None] * w_d
        x_tile = tl.load(x_at, mask=(t[:, None] < T) & (d[None, :] < D), other=0.0)
        w_tile = tl.load(w_at, mask=(r[None, :] < R) & (d[:, None] < D), other=0.0)
        acc = _dot(x_tile.to(w_tile.dtype), w_tile, acc, INTERPRET)
    if factor is not None:
        acc *= tl.load(factor + s * R + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    h_at = h + (s * T + t[:, None]) * R + r[None, :]
    tl.store(h_at, acc.to(h.dtype.element_ty), mask=(t[:, None] < T) & (r[None, :] < R))


@jit
def _expand_kernel(  # type: ignore[no-untyped-def]
    h, w, base, slots, y, T, D, R,
    w_s, w_d, w_r, base_k, base_t, base_d, y_k, y_t, y_d,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (block of T, block of D, slot). h: [S, T, R], contiguous; base may be y."""
    s = tl.program_id(2).to(tl.int64)
    k = s if slots is None else tl.load(slots + s)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R).to(tl.int64)
        h_at = h + (s * T + t[:, None]) * R + r[None, :]
        w_at = w + s * w_s + d[None, :] * w_d + r[:, None] * w_r
        h_tile = tl.load(h_at, mask=(t[:, None] < T) & (r[None, :] < R), other=0.0)
        w_tile = tl.load(w_at, mask=(d[None, :] < D) & (r[:, None] < R), other=0.0)
        acc = _dot(h_tile, w_tile.to(h_tile.dtype), acc, INTERPRET)
    inside = (t[:, None] < T) & (d[None, :] < D)
    if base is not None:
        base_at = base + k * base_k + t[:, None] * base_t + d[None, :] * base_d
        acc += tl.load(base_at, mask=inside, other=0.0).to(tl.float32)
    y_at = y + k * y_k + t[:, None] * y_t + d[None, :] * y_d
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=inside)


@jit
def _outer_kernel(  # type: ignore[no-untyped-def]
    h, x, slots, partial, S, T, D, R, x_k, x_t, x_d,
    CHUNK_T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (block of D, chunk of T and block of R, slot). h: [S, T, R], partial: [chunks, S, R, D], contiguous."""
    s = tl.program_id(2).to(tl.int64)
    k = s if slots is None else tl.load(slots + s)
    blocks_r = tl.cdiv(R, BLOCK_R)
    chunk = (tl.program_id(1) // blocks_r).to(tl.int64)
    r = (tl.program_id(1) % blocks_r).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, CHUNK_T, BLOCK_T):
        t = chunk * CHUNK_T + start + tl.arange(0, BLOCK_T)
        h_at = h + (s * T + t[None, :]) * R + r[:, None]
        x_at = x + k * x_k + t[:, None] * x_t + d[None, :] * x_d
        h_tile = tl.load(h_at, mask=(t[None, :] < T) & (r[:, None] < R), other=0.0)
        x_tile = tl.load(x_at, mask=(t[:, None] < T) & (d[None, :] < D), other=0.0)
        acc = _dot(h_tile, x_tile.to(h_tile.dtype), acc, INTERPRET)
    at = partial + ((chunk * S + s) * R + r[:, None]) * D + d[None, :]
    tl.store(at, acc, mask=(r[:, None] < R) & (d[None, :] < D))


def triton_shrink(x: Tensor, w: Tensor, factor: Tensor | None, slots: Tensor | None) -> Tensor:
    (s, r, d), t = w.shape, x.shape[1]
    h = _empty((s, t, r), w.dtype, x.device)
    blocks = _blocks(r)
    grid = (triton.cdiv(t, BLOCK_T), triton.cdiv(r, blocks["BLOCK_R"]), s)
    if factor is not None:
        factor = factor.contiguous()
    with torch.cuda.device_of(x):
        _shrink_kernel[grid](x, w, factor, slots, h, t, d, r, *x.stride(), *w.stride(), **blocks)
    return h


def triton_expand(h: Tensor, w: Tensor, base: Tensor | None, y: Tensor, slots: Tensor | None = None) -> Tensor:
    """y[slots] = base[slots] + h w^T, written into y."""
    (s, t, r), d = h.shape, w.shape[1]
    grid = (triton.cdiv(t, BLOCK_T), triton.cdiv(d, BLOCK_D), s)
    strides = (*w.stride(), *(y if base is None else base).stride(), *y.stride())
    with torch.cuda.device_of(y):
        _expand_kernel[grid](h.contiguous(), w, base, slots, y, t, d, r, *strides, **_blocks(r))
    return y


def triton_outer(h: Tensor, x: Tensor, slots: Tensor | None) -> Tensor:
    """In two stages, a sum per chunk of tokens and the sum of these: atomics would make the order, and with it the
    result, differ from run to run."""
    (s, t, r), d = h.shape, x.shape[2]
    chunks, blocks = triton.cdiv(t, CHUNK_T), _blocks(r)
    partial = _empty((chunks, s, r, d), torch.float32, x.device)
    grid = (triton.cdiv(d, BLOCK_D), chunks * triton.cdiv(r, blocks["BLOCK_R"]), s)
    with torch.cuda.device_of(x):
        _outer_kernel[grid](h.contiguous(), x, slots, partial, s, t, d, r, *x.stride(), CHUNK_T=CHUNK_T, **blocks)
    return partial.sum(0).to(h.dtype)


def _blocks(r: int) -> dict[str, Any]:
    block_r = min(MAX_BLOCK_R, max(16, triton.next_power_of_2(r)))  # `tl.dot` takes no side below 16
    return {"BLOCK_T": BLOCK_T, "BLOCK_D": BLOCK_D, "BLOCK_R": block_r, "INTERPRET": INTERPRET}


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the kernels write to, results and scratch; the tests fill it with NaN."""
    return torch.empty(shape, dtype=dtype, device=device)
