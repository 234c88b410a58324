"""The three products of which every packed adapter is made, forward and backward.

An adapter is narrow in the middle, so with w a down-projection or a transposed up-projection:

    shrink   h = x w^T      [K, T, D] to [S, T, R]
    expand   y = h w^T      [S, T, R] to [S, T, D] or added in place to the slots of a [K, T, D]
    outer    g = h^T x      [S, T, R], [K, T, D] to [S, R, D], the gradient of a projection

Letters: K slots in the batch, S slots that the adapter serves (`slots` [S]: which, distinct; None: all K, in order),
T tokens per slot, D features (wide), R rank (narrow, the largest of the slots). Products are taken in the adapter's
type, that of w or h; the wide tensors may have another. Any tensor may be strided.

PyTorch serves CPUs. Triton serves CUDA tensors, and under its interpreter all tensors. float64 stays with PyTorch.
Where the types agree (with Triton, always) no wide tensor is made beside the result: copies of these, not operations,
are what a pack waits for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from autopeft.kernels.tiles import Tiles, blocks, expand_tiles, outer_chunk, outer_tiles, shrink_tiles

try:
    import triton
    import triton.language as tl
except ImportError:  # there is none for this platform
    triton = None

#: Types that the Triton kernels take; float64 is for checking gradients and stays with PyTorch.
TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def shrink(x: Tensor, w: Tensor, factor: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
    """Return h = (x[slots] w^T) * factor.

    x: [K, T, D], w: [S, R, D], factor: [S, R], slots: [S] (None: S = K, all). Returns [S, T, R] in w's type.
    """
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
    """Return y = base + h w^T as a new tensor.

    h: [K, T, R], w: [K, D, R], base: [K, T, D]. Returns [K, T, D] in `dtype`.
    """
    if by_triton(h, w, base):
        return triton_expand(h, w, base, _empty((*h.shape[:2], w.shape[1]), dtype, h.device))
    if base is None:
        return torch.bmm(h, w.transpose(1, 2)).to(dtype)
    if base.dtype == h.dtype:
        return torch.baddbmm(base, h, w.transpose(1, 2)).to(dtype)
    return torch.bmm(h, w.transpose(1, 2)).add_(base).to(dtype)


def expand_(y: Tensor, h: Tensor, w: Tensor, slots: Tensor | None = None) -> Tensor:
    """Add h w^T to y[slots] in place.

    y: [K, T, D], h: [S, T, R], w: [S, D, R], slots: [S] (None: S = K, all). Returns [K, T, D]: y itself.
    """
    if by_triton(h, w, y):
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
    """Return g = h^T x[slots], summed over tokens.

    h: [S, T, R], x: [K, T, D], slots: [S] (None: S = K, all). Returns [S, R, D] in h's type.
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


def has_triton() -> bool:
    """Whether Triton is installed, and not switched off by `without_triton`."""
    return triton is not None


def by_triton(*tensors: Tensor | None) -> bool:
    """Whether Triton serves an op on these: CUDA tensors, and under its interpreter those of a CPU as well."""
    return has_triton() and all(
        t is None or (t.dtype in TRITON_TYPES and (t.is_cuda or (INTERPRET and t.is_cpu))) for t in tensors
    )


@contextmanager
def without_triton() -> Iterator[None]:
    """Serve every op of `kernels/` by PyTorch, whatever the device. In all threads: autograd has its own."""
    global triton
    module, triton = triton, None
    try:
        yield
    finally:
        triton = module


# Kernels. Offsets are int64: K * T * D passes 2^31 in a large pack. Loads are masked, so that no size is a constant of
# the compiled kernel. What changes with minibatch and pack (T, R, S and the strides that R is in) is not specialised:
# without that Triton compiles again for 1 and for multiples of 16. It still has to know that ranks lie 16 bytes apart
# to load them so. `R_STEP` and `W_STEP` say it, 8 or 1: R and strides come in these units. Features and the strides of
# wide tensors are the model's, and specialised. Along a grid's y and z (65535 at most) lie blocks of features, of
# ranks, and slots; tokens lie along x.

#: Under Triton's interpreter, which computes a bfloat16 `tl.dot` wrongly, without a word: operands are widened there.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


class Kernel(Protocol):
    """A Triton kernel: indexed by a grid it launches, called it is part of another kernel."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """Return the launcher of a grid of programs."""

    def __call__(self, *args: Any) -> Any:
        """Compute within the kernel that calls this one."""


def jit(*, do_not_specialize: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """`triton.jit`; without Triton the kernels are plain functions that nobody calls."""
    if triton is None:
        return lambda kernel: cast(Kernel, kernel)
    return cast("Callable[[Callable[..., Any]], Kernel]", triton.jit(do_not_specialize=do_not_specialize))


@jit()
def _dot(a, b, acc, PRODUCT: tl.constexpr, INTERPRET: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return acc + a b in float32, see `Tiles`."""
    if PRODUCT == "pieces":  # the smallest first
        if a.dtype == tl.float32:
            high, middle, low = _pieces(a)
            acc = _dot(low, b, acc, "mma", INTERPRET)
            acc = _dot(middle, b, acc, "mma", INTERPRET)
            acc = _dot(high, b, acc, "mma", INTERPRET)
        else:
            high, middle, low = _pieces(b)
            acc = _dot(a, low, acc, "mma", INTERPRET)
            acc = _dot(a, middle, acc, "mma", INTERPRET)
            acc = _dot(a, high, acc, "mma", INTERPRET)
    elif INTERPRET:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif PRODUCT == "mma":
        acc = tl.dot(a, b, acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRODUCT)
    return acc


@jit()
def _pieces(x):  # type: ignore[no-untyped-def]
    """Split a float32 below 3.3e38 into three bfloat16 numbers whose sum it is; what is not finite becomes NaN."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@jit()
def _strides(w_s, w_r, w_d, DENSE: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the strides of a narrow tensor, with all that `_narrow` knows of them."""
    if DENSE == "D":
        return w_s * STEP, w_r * STEP, 1
    if DENSE == "R":
        return w_s * STEP, 1, w_d * STEP
    return w_s, w_r, w_d


@jit(do_not_specialize=["T", "R", "w_s", "w_r", "w_d"])
def _shrink_kernel(  # type: ignore[no-untyped-def]
    x, w, factor, slots, h, T, D, R,
    x_k, x_t, x_d, w_s, w_r, w_d,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRODUCT: tl.constexpr,
    W_DENSE: tl.constexpr, W_STEP: tl.constexpr, R_STEP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Run program (block of T, block of R, slot). h: [S, T, R], contiguous."""
    R *= R_STEP
    w_s, w_r, w_d = _strides(w_s, w_r, w_d, W_DENSE, W_STEP)
    s = tl.program_id(2).to(tl.int64)
    k = s if slots is None else tl.load(slots + s).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        x_at = x + k * x_k + t[:, None] * x_t + d[None, :] * x_d
        w_at = w + s * w_s + r[None, :] * w_r + d[:, None] * w_d
        x_tile = tl.load(x_at, mask=(t[:, None] < T) & (d[None, :] < D), other=0.0)
        w_tile = tl.load(w_at, mask=(r[None, :] < R) & (d[:, None] < D), other=0.0)
        if PRODUCT != "pieces":
            x_tile = x_tile.to(w_tile.dtype)
        acc = _dot(x_tile, w_tile, acc, PRODUCT, INTERPRET)
    if factor is not None:
        acc *= tl.load(factor + s * R + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    h_at = h + (s * T + t[:, None]) * R + r[None, :]
    tl.store(h_at, acc.to(h.dtype.element_ty), mask=(t[:, None] < T) & (r[None, :] < R))


@jit(do_not_specialize=["T", "R", "w_s", "w_r", "w_d"])
def _expand_kernel(  # type: ignore[no-untyped-def]
    h, w, base, slots, y, T, D, R,
    w_s, w_r, w_d, base_k, base_t, base_d, y_k, y_t, y_d,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRODUCT: tl.constexpr,
    W_DENSE: tl.constexpr, W_STEP: tl.constexpr, R_STEP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Run program (block of T, block of D, slot). h: [S, T, R], contiguous; base may be y."""
    R *= R_STEP
    w_s, w_r, w_d = _strides(w_s, w_r, w_d, W_DENSE, W_STEP)
    s = tl.program_id(2).to(tl.int64)
    k = s if slots is None else tl.load(slots + s).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t[:, None] < T) & (d[None, :] < D)
    if base is not None:  # asked for first, needed last
        base_at = base + k * base_k + t[:, None] * base_t + d[None, :] * base_d
        base_tile = tl.load(base_at, mask=inside, other=0.0)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R).to(tl.int64)
        h_at = h + (s * T + t[:, None]) * R + r[None, :]
        w_at = w + s * w_s + d[None, :] * w_d + r[:, None] * w_r
        h_tile = tl.load(h_at, mask=(t[:, None] < T) & (r[None, :] < R), other=0.0)
        w_tile = tl.load(w_at, mask=(d[None, :] < D) & (r[:, None] < R), other=0.0)
        acc = _dot(h_tile, w_tile.to(h_tile.dtype), acc, PRODUCT, INTERPRET)
    if base is not None:
        acc += base_tile.to(tl.float32)
    y_at = y + k * y_k + t[:, None] * y_t + d[None, :] * y_d
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["S", "T", "R", "chunk"])
def _outer_kernel(  # type: ignore[no-untyped-def]
    h, x, slots, partial, S, T, D, R, x_k, x_t, x_d, chunk,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRODUCT: tl.constexpr,
    R_STEP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Run program (block of D, chunk of T and block of R, slot). h: [S, T, R], partial: [chunks, S, R, D], dense."""
    R *= R_STEP
    s = tl.program_id(2).to(tl.int64)
    k = s if slots is None else tl.load(slots + s).to(tl.int64)
    blocks_r = tl.cdiv(R, BLOCK_R)
    own = (tl.program_id(1) // blocks_r).to(tl.int64)
    r = (tl.program_id(1) % blocks_r).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, chunk, BLOCK_T):
        t = own * chunk + start + tl.arange(0, BLOCK_T)
        h_at = h + (s * T + t[None, :]) * R + r[:, None]
        x_at = x + k * x_k + t[:, None] * x_t + d[None, :] * x_d
        h_tile = tl.load(h_at, mask=(t[None, :] < T) & (r[:, None] < R), other=0.0)
        x_tile = tl.load(x_at, mask=(t[:, None] < T) & (d[None, :] < D), other=0.0)
        if PRODUCT != "pieces":
            x_tile = x_tile.to(h_tile.dtype)
        acc = _dot(h_tile, x_tile, acc, PRODUCT, INTERPRET)
    at = partial + ((own * S + s) * R + r[:, None]) * D + d[None, :]
    tl.store(at, acc, mask=(r[:, None] < R) & (d[None, :] < D))


def triton_shrink(
    x: Tensor, w: Tensor, factor: Tensor | None, slots: Tensor | None, tiles: Tiles | None = None
) -> Tensor:
    """Run `shrink` by Triton. tiles: None for those of the rule, here and below."""
    (s, r, d), t = w.shape, x.shape[1]
    tiles = tiles or shrink_tiles(t, r, x.dtype, w.dtype, x.device)
    h = _empty((s, t, r), w.dtype, x.device)
    grid = (blocks(t, tiles.tokens), blocks(r, tiles.ranks), s)
    strides, narrow = _narrow(w)
    step = _step(r) if narrow["W_DENSE"] == "R" else 1  # only there does a load run along ranks
    factor, slots = (None if given is None else given.contiguous() for given in (factor, slots))
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors are on
        _shrink_kernel[grid](
            x, w, factor, slots, h, t, d, r // step, *x.stride(), *strides,
            **narrow, R_STEP=step, **tiles.constants(), INTERPRET=INTERPRET,
        )  # fmt: skip
    return h


def triton_expand(
    h: Tensor, w: Tensor, base: Tensor | None, y: Tensor, slots: Tensor | None = None, tiles: Tiles | None = None
) -> Tensor:
    """Write base[slots] + h w^T into y[slots].

    h: [S, T, R], w: [S, D, R], base: [K, T, D] (None: y), y: [K, T, D], slots: [S]. Returns [K, T, D]: y itself.
    """
    (s, t, r), d = h.shape, w.shape[1]
    tiles = tiles or expand_tiles(r, h.dtype, h.device)
    grid = (blocks(t, tiles.tokens), blocks(d, tiles.features), s)
    strides, narrow = _narrow(w.transpose(1, 2))
    step, of_base = _step(r), (y if base is None else base).stride()
    slots = None if slots is None else slots.contiguous()
    with torch.cuda.device_of(y):
        _expand_kernel[grid](
            h.contiguous(), w, base, slots, y, t, d, r // step, *strides, *of_base, *y.stride(),
            **narrow, R_STEP=step, **tiles.constants(), INTERPRET=INTERPRET,
        )  # fmt: skip
    return y


def triton_outer(
    h: Tensor, x: Tensor, slots: Tensor | None, tiles: Tiles | None = None, chunk: int | None = None
) -> Tensor:
    """Run `outer` in two stages: a sum per chunk of tokens (a multiple of the tiles') and the sum of these.

    Atomics would make the order, and with it the result, differ from run to run.
    """
    (s, t, r), d = h.shape, x.shape[2]
    tiles = tiles or outer_tiles(r, x.dtype, h.dtype, x.device)
    chunk = chunk or outer_chunk(t, d, tiles)
    chunks, step = max(1, blocks(t, chunk)), _step(r)  # of no tokens the sum is 0
    partial = _empty((chunks, s, r, d), torch.float32, x.device)
    grid = (blocks(d, tiles.features), chunks * blocks(r, tiles.ranks), s)
    slots = None if slots is None else slots.contiguous()
    with torch.cuda.device_of(x):
        _outer_kernel[grid](
            h.contiguous(), x, slots, partial, s, t, d, r // step, *x.stride(), chunk,
            R_STEP=step, **tiles.constants(), INTERPRET=INTERPRET,
        )  # fmt: skip
    return (partial[0] if chunks == 1 else partial.sum(0)).to(h.dtype)


def _narrow(w: Tensor) -> tuple[list[int], dict[str, Any]]:
    """Return the strides of w [S, R, D] in units of `W_STEP`, and the one of its last axes that is dense in memory."""
    # In this order: up-projections of rank 1, dense along both, go with those of other ranks.
    dense = "R" if w.stride(1) == 1 else "D" if w.stride(2) == 1 else ""
    strides = [stride if size > 1 else 0 for size, stride in zip(w.shape, w.stride(), strict=True)]
    others = [stride for axis, stride in zip("SRD", strides, strict=True) if axis != dense]
    step = min(_step(stride) for stride in others) if dense else 1
    return [stride // step for stride in strides], {"W_DENSE": dense, "W_STEP": step}


def _step(n: int) -> int:
    return 8 if n % 8 == 0 else 1


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a tensor that kernels write to, result or scratch; the tests fill it with NaN."""
    return torch.empty(shape, dtype=dtype, device=device)
