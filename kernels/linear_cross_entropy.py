"""Linear cross-entropy: the loss of every token under a frozen output layer, without the logits of all tokens.

Letters: M tokens, D features, V vocabulary, C tokens of a chunk.

The logits [M, V] of a language model are often its largest tensor. Here they exist for C tokens at a time. The loss of
a token depends on its own hidden state alone, so its gradient is computed while the chunk is at hand, and the backward
pass only scales it by whatever gradient the loss receives (after the fused linear cross-entropy of Liger Kernel, Hsu
et al. 2024, which does so for the mean; token by token it is exact for every later reduction).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear

from autopeft.kernels.counts import Count, matmul_count
from autopeft.kernels.slot_products import by_triton, jit

try:
    import triton.language as tl
except ImportError:  # there is none for this platform
    tl = None

#: Logits of a chunk: 64 MB in float32.
CHUNK_ELEMENTS = 2**24
#: On CUDA: 128 MB in bfloat16, as two products read the whole weight for every chunk. C rows do 2 C operations per
#: number of it, C per byte in bfloat16, and an H100 does some 300 in the time of a byte (counted, not measured). Of a
#: vocabulary of 131072 this is 512 rows.
CUDA_CHUNK_ELEMENTS = 2**26
#: Every chunk reads the whole weight, so a large vocabulary must not make the chunks small.
MIN_CHUNK = 256


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of logits = hidden weight^T + bias, and whether the largest of them is the target's.

    hidden: [M, D], weight: [V, D], targets: [M] int64 in 0..V-1, bias: [V], chunk: tokens at a time (None: as
    `chunk_rows` says). Returns losses and correct (1 or 0), each [M] float32. The logits have hidden's dtype, their
    softmax float32. The gradient is that of `hidden` only, once differentiable. Raises ValueError where weight or bias
    want one too.
    """
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("linear_cross_entropy has no gradient for weight and bias: they have to be frozen")
    rows = chunk or chunk_rows(len(weight), hidden.device)
    with_gradient = torch.is_grad_enabled() and hidden.requires_grad
    losses, correct, _ = _op(hidden, weight, targets, bias, rows, with_gradient)
    return losses, correct


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Return the tokens of a chunk. On CUDA a multiple of 128, the rows of the tiles of large matrix products."""
    if device.type != "cuda":
        return max(MIN_CHUNK, CHUNK_ELEMENTS // vocabulary)
    return max(MIN_CHUNK, CUDA_CHUNK_ELEMENTS // vocabulary // 128 * 128)


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the same from all logits at once, in float32."""
    logits = linear(hidden.float(), weight.float(), None if bias is None else bias.float())  # [M, V]
    return cross_entropy(logits, targets, reduction="none"), (logits.argmax(-1) == targets).float()


@torch.library.custom_op("autopeft::linear_cross_entropy", mutates_args=())
def _op(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, chunk: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses and correct [M], and each loss's gradient with respect to its hidden state [M, D] or empty."""
    if not by_triton(hidden, weight):
        return _in_chunks(_softmax, hidden, weight, targets, bias, chunk, with_gradient)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, whatever the tensors are on
        return _in_chunks(_softmax_triton, hidden, weight, targets.contiguous(), bias, chunk, with_gradient)


@_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, chunk: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(hidden, with_gradient)


def _empty(hidden: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    # In hidden's dtype: the matrix product that makes it rounds to that anyway, and loss by loss, before any mean has
    # scaled it down, is where the range of float16 fits best.
    gradient = hidden.new_empty(hidden.shape if with_gradient else 0)
    return losses, torch.empty_like(losses), gradient


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, correct, gradient = output
    ctx.mark_non_differentiable(correct, gradient)
    ctx.save_for_backward(gradient)


@once_differentiable
def _backward(ctx: Any, grad_losses: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (gradient * grad_losses[:, None]).to(gradient.dtype), None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _in_chunks(
    softmax: Callable[[Tensor, Tensor, Tensor, Tensor, bool], None],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    chunk: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    losses, correct, gradient = _empty(hidden, with_gradient)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        logits = linear(hidden[rows], weight, bias)  # [C, V]
        softmax(logits, targets[rows], losses[rows], correct[rows], with_gradient)
        if with_gradient:
            torch.mm(logits, weight, out=gradient[rows])
    return losses, correct, gradient


def _softmax(logits: Tensor, targets: Tensor, losses: Tensor, correct: Tensor, with_gradient: bool) -> None:
    """Fill losses and correct [C]; overwrite the logits [C, V], with their own gradient if that is wanted."""
    at_target = targets[:, None]
    top, first = logits.max(-1, keepdim=True)
    correct.copy_(first[:, 0] == targets)
    shifted = logits.float().sub_(top)  # in place where the logits are float32
    of_target = shifted.gather(1, at_target)
    total = shifted.exp_().sum(-1, keepdim=True)
    losses.copy_((total.log() - of_target)[:, 0])
    if with_gradient:
        shifted.div_(total).scatter_add_(1, at_target, shifted.new_full(at_target.shape, -1.0))
        if shifted is not logits:
            logits.copy_(shifted)


#: Finite, because -inf - -inf is not a number: below every logit, and the exponential of the difference is 0.
_LOWEST = None if tl is None else tl.constexpr(-3.0e38)


# Rows are counted by the grid, not by an argument, and the vocabulary is the model's: specialised, it lets loads take
# 16 bytes. targets, losses and correct are parts of larger tensors, aligned or not: one number a row, it is the same.
@jit(do_not_specialize=["targets", "losses", "correct"])
def _softmax_kernel(  # type: ignore[no-untyped-def]
    logits, targets, losses, correct, vocabulary, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """Run one program per token: an online log-sum-exp in each lane (Milakov and Gimelshein 2018), then over lanes."""
    row = tl.program_id(0).to(tl.int64)  # C * V may be beyond 32 bits; a column is not
    logits += row * vocabulary
    target = tl.load(targets + row)
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocabulary, BLOCK):
        column = start + lane
        x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        first = tl.where(x > top, column, first)
        top = higher
    highest = tl.max(top, 0)
    total_of_row = tl.sum(total * tl.exp(top - highest), 0)
    first_of_row = tl.min(tl.where(top == highest, first, vocabulary), 0)
    # A target outside of the vocabulary makes the loss NaN; it must not read the memory of others.
    inside = (target >= 0) & (target < vocabulary)
    of_target = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(losses + row, tl.log(total_of_row) - (of_target - highest))
    tl.store(correct + row, (first_of_row == target).to(tl.float32))
    if WITH_GRADIENT:
        tl.debug_barrier()  # no warp overwrites the target's logit before the others have read it
        for start in range(0, vocabulary, BLOCK):
            column = start + lane
            x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - highest) / total_of_row - (column == target).to(tl.float32)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < vocabulary)


def _softmax_triton(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    correct: Tensor,
    with_gradient: bool,
    block: int | None = None,
    warps: int = 8,
) -> None:
    """Run `_softmax` in two passes over the logits where PyTorch takes many. block: columns at a time, a power of 2."""
    vocabulary = logits.shape[1]
    block = block or softmax_block(vocabulary)
    _softmax_kernel[(len(logits),)](
        logits, targets, losses, correct, vocabulary, WITH_GRADIENT=with_gradient, BLOCK=block, num_warps=warps
    )


def softmax_block(vocabulary: int) -> int:
    """Return the columns at a time: 16 per thread of 8 warps, two loads of 16 bytes under way in bfloat16.

    These are 8 to 38 turns for vocabularies of 32k to 152k. Chosen from that count, not measured.
    """
    return min(4096, max(16, 1 << (vocabulary - 1).bit_length()))


def softmax_count(rows: int, vocabulary: int, dtype: torch.dtype, with_gradient: bool = True) -> Count:
    """Count the softmax of one chunk: logits are read once, for the gradient again, which is written in their place.

    Operations per logit: 5 (difference, exponential, sum, and the running maximum's), for the gradient 4 more.
    Targets, losses and hits are not counted.
    """
    passes, operations = (3, 9) if with_gradient else (1, 5)
    return Count(operations * rows * vocabulary, passes * rows * vocabulary * dtype.itemsize)


def linear_cross_entropy_count(
    tokens: int, features: int, vocabulary: int, dtype: torch.dtype, chunk: int, with_gradient: bool = True
) -> Count:
    """Count all chunks: the logits, their softmax, and the gradient of the hidden states.

    Each product reads the weight again.
    """
    count = Count(0, 0)
    for start in range(0, tokens, chunk):
        rows = min(chunk, tokens - start)
        product = matmul_count(rows, features, vocabulary, dtype)  # the gradient's moves the same three matrices
        count += product + softmax_count(rows, vocabulary, dtype, with_gradient)
        if with_gradient:
            count += product
    return count
