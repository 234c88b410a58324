"""(b) Every operator of `kernels/` through Triton against its reference in higher precision: output and gradients.

Sizes are odd, ranks go from 1 over every bucket of tile sizes, axes are strided, and memory that is allocated and not
written holds NaN. Two cases on a card have tensors of more than 2^31 elements. Without CUDA Triton's interpreter
computes the same at tiny sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autopeft.benchmarks.gpu.models import free_memory
from autopeft.benchmarks.gpu.phase import ResultRow, Run
from autopeft.kernels import linear_cross_entropy as cross_entropy
from autopeft.kernels import mixture_lora as mixture
from autopeft.kernels import packed_bottleneck as bottleneck
from autopeft.kernels import packed_lora as lora

#: Types of the backbone and of the adapters, and the allowed relative error (root of mean squares).
TYPES: dict[str, tuple[torch.dtype, torch.dtype, float]] = {
    "bf16 + fp32": (torch.bfloat16, torch.float32, 1e-2),
    "fp32": (torch.float32, torch.float32, 1e-5),
    "bf16": (torch.bfloat16, torch.bfloat16, 2e-2),  # intermediate results are rounded to 8 bits too
    "fp16": (torch.float16, torch.float16, 3e-3),
}
#: Slots, tokens per slot, features in and out, the ranks of the slots.
Sizes = tuple[int, int, int, tuple[int, ...]]
REAL: tuple[Sizes, ...] = (
    (513, 896, 1152, (16, 16, 16)),
    (37, 67, 35, (1,)),
    (1000, 1537, 895, (1, 5, 3)),
    (129, 2048, 512, (33, 64, 8)),
    (256, 896, 4864, (128, 7)),
    (1, 64, 64, (8, 8)),
    (4096, 4096, 4096, (64,)),
)
TOY: tuple[Sizes, ...] = ((19, 35, 67, (3, 5)), (1, 67, 35, (33,)))
#: Rows, features and vocabulary of the linear cross-entropy.
HeadShape = tuple[int, int, int]
REAL_HEADS: tuple[HeadShape, ...] = ((513, 896, 151936), (1, 64, 37), (300, 1536, 32003))
TOY_HEADS: tuple[HeadShape, ...] = ((5, 6, 2345),)


def measure(run: Run) -> Iterator[ResultRow]:
    """Yield one row per operator, types and shape: its relative error and whether the test passed."""
    # With this, torch fills uninitialised memory with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    device = torch.device(run.device)
    assert torch.empty(3, device=device).isnan().all()
    for number, (name, (wide, narrow, tolerance)) in enumerate(TYPES.items()):
        sizes: Sequence[Sizes] = TOY if run.toy else REAL
        heads: Sequence[HeadShape] = TOY_HEADS if run.toy else REAL_HEADS
        if name == "fp16":
            sizes = sizes[:2]  # compiling takes most of the time, and such backbones are rare
        if wide is torch.bfloat16 and number:
            heads = ()  # the same as with the default types: the loss has no adapters
        for size in sizes:
            for op, check in CHECKS.items():
                if not run.has_time(f"{op}, {name}, {_words(size)}", 6.0):
                    continue
                yield _row(op, name, _words(size), tolerance, partial(check, Draw(device, wide, narrow), size))
        for head in heads:
            if run.has_time(f"linear cross-entropy, {name}, {head}", 6.0):
                words = "{} tokens, {} features, {} words".format(*head)
                yield _row(
                    "linear cross-entropy", name, words, tolerance, partial(_head, Draw(device, wide, narrow), head)
                )
        if device.type == "cuda" and not number:
            yield from _large(run, device)


def _large(run: Run, device: torch.device) -> Iterator[ResultRow]:
    for name, check, nbytes in LARGE:
        free_memory()
        if torch.cuda.mem_get_info(device)[0] < nbytes:
            run.left_out.append(f"{name}: needs {nbytes / 2**30:.0f} GiB of free memory")
        elif run.has_time(name, 10.0):
            yield _row(name, "bf16 + fp32", "more than 2^31 elements", 1e-2, partial(check, device))
    free_memory()


def _row(op: str, types: str, shape: str, tolerance: float, check: Callable[[], float]) -> ResultRow:
    """Run one test. An exception is its result: the others go on."""
    row: ResultRow = {"op": op, "types": types, "shape": shape, "tolerance": tolerance}
    try:
        error = check()
    except Exception as problem:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises after an illegal access, which no later test survives: ends the phase
        return row | {"passed": False, "error": f"{type(problem).__name__}: {problem}"[:2000]}
    return row | {"passed": error <= tolerance, "relative_error": error}


class Draw:
    """Generator of random tensors of the backbone's and the adapters' types. `leaves`: those with a gradient."""

    def __init__(self, device: torch.device, wide: torch.dtype, narrow: torch.dtype) -> None:
        self.device, self.wide, self.narrow = device, wide, narrow
        self.generator = torch.Generator(device).manual_seed(0)
        self.leaves: list[Tensor] = []

    def constant(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Draw a tensor without a gradient, by default in the wide type."""
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.wide)

    def activations(self, *shape: int) -> Tensor:
        """Draw [K, T, D] in the wide type, with a gradient; its slots and tokens are not in the order of memory."""
        k, t, d = shape
        return self._leaf((self.constant(t, k, d + 8) / d**0.5)[..., :d].transpose(0, 1))

    def weights(self, *shape: int) -> Tensor:
        """Draw a tensor in the narrow type, with a gradient."""
        return self._leaf(self.constant(*shape, dtype=self.narrow))

    def _leaf(self, tensor: Tensor) -> Tensor:
        self.leaves.append(tensor.detach().requires_grad_())
        return self.leaves[-1]


def _words(size: Sizes) -> str:
    tokens, d_in, d_out, ranks = size
    return f"{len(ranks)} x {tokens} tokens, {d_in} to {d_out}, ranks {'/'.join(map(str, ranks))}"


def _mask(ranks: Sequence[int], like: Tensor) -> Tensor | None:
    if len(set(ranks)) == 1:
        return None
    owned = torch.arange(max(ranks))[None, :] < torch.tensor(ranks)[:, None]
    return owned.to(like)


def relative_error(
    op: Callable[..., Tensor], reference: Callable[..., Tensor], leaves: list[Tensor], *args: Any
) -> float:
    """Return the largest relative error over output and gradients, against the reference in float64.

    Each is the norm of the difference over the norm of the reference's; infinite if anything is not finite.
    """
    exact = {id(leaf): leaf.detach().double().requires_grad_() for leaf in leaves}

    def widened(value: Any) -> Any:
        if id(value) in exact:
            return exact[id(value)]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    out, expected = op(*args), reference(*map(widened, args))
    pull = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(7), device=out.device)
    pull = pull.to(out.dtype)
    ours = [out, *torch.autograd.grad(out, leaves, pull)]
    theirs = [expected, *torch.autograd.grad(expected, list(exact.values()), pull.to(expected.dtype))]
    return max(_error(own, other) for own, other in zip(ours, theirs, strict=True))


def _error(ours: Tensor, expected: Tensor) -> float:
    ours, expected = ours.detach().double(), expected.detach().double()
    if not (ours.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return float((ours - expected).norm() / expected.norm().clamp(min=1e-30))


def _served(count: int, device: torch.device) -> tuple[int, Tensor]:
    """Return the number of slots of a pack in which an adapter serves `count`, and these slots, not in order."""
    return count + 1, torch.tensor([count, *range(count - 1)], device=device)


def _lora(draw: Draw, size: Sizes) -> float:
    t, d_in, d_out, ranks = size
    k, r = len(ranks), max(ranks)
    x, a, b = draw.activations(k, t, d_in), draw.weights(k, r, d_in), draw.weights(k, d_out, r)
    args = (x, a, b, draw.constant(k, dtype=draw.narrow).abs() + 0.5, _mask(ranks, a))
    return relative_error(lora.packed_lora, lora.packed_lora_reference, draw.leaves, *args)


def _lora_linear(draw: Draw, size: Sizes, some: bool = False) -> float:
    t, d_in, d_out, ranks = size
    s, r = len(ranks), max(ranks)
    k, slots = _served(s, draw.device) if some else (s, None)
    x, a, b = draw.activations(k, t, d_in), draw.weights(s, r, d_in), draw.weights(s, d_out, r)
    weight, bias = draw.constant(d_out, d_in), draw.constant(d_out)
    args = (x, weight, bias, a, b, draw.constant(s, dtype=draw.narrow).abs() + 0.5, _mask(ranks, a), slots)
    return relative_error(lora.packed_lora_linear, lora.packed_lora_linear_reference, draw.leaves, *args)


def _bottleneck(draw: Draw, size: Sizes) -> float:
    t, d, _, ranks = size
    k, r = len(ranks), max(ranks)
    z = draw.activations(k, t, d)
    weights = draw.weights(k, r, d), draw.weights(k, r), draw.weights(k, d, r), draw.weights(k, d)
    scale = draw.constant(k, dtype=draw.narrow).abs() + 0.5
    args = (z, z, *weights, scale, _mask(ranks, weights[0]), "gelu")
    return relative_error(bottleneck.packed_bottleneck, bottleneck.packed_bottleneck_reference, draw.leaves, *args)


def _mixture(draw: Draw, size: Sizes) -> float:
    """Test four experts, two for a token, against a product for each expert over all tokens."""
    t, d_in, d_out, ranks = size
    k, r, e = len(ranks), max(ranks), 4
    x, a, b = draw.activations(k, t, d_in), draw.weights(k, e, r, d_in), draw.weights(k, e, d_out, r)
    top = draw.constant(k, t, e, dtype=draw.narrow).topk(2)
    gates = torch.zeros(k, t, e, device=draw.device, dtype=draw.narrow).scatter_(2, top.indices, top.values.softmax(2))
    draw.leaves.append(gates.requires_grad_())
    scale = draw.constant(k, dtype=draw.narrow).abs() + 0.5

    def reference(x: Tensor, a: Tensor, b: Tensor, gates: Tensor, scale: Tensor) -> Tensor:
        each = torch.einsum("ktei,keoi->kteo", torch.einsum("ktd,keid->ktei", x, a), b)
        return torch.einsum("kteo,kte->kto", each, gates) * scale[:, None, None]

    def op(x: Tensor, a: Tensor, b: Tensor, gates: Tensor, scale: Tensor) -> Tensor:
        return mixture.mixture_lora(x, a, b, gates, scale)

    return relative_error(op, reference, draw.leaves, x, a, b, gates, scale)


def _head(draw: Draw, head: HeadShape) -> float:
    """Test losses and the gradient of the hidden states."""
    tokens, features, vocabulary = head
    hidden = draw._leaf(draw.constant(tokens, features))
    weight = draw.constant(vocabulary, features) / features**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=draw.generator, device=draw.device)

    def losses(way: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda hidden, weight: way(hidden, weight, targets)[0]

    return relative_error(
        losses(cross_entropy.linear_cross_entropy),
        losses(cross_entropy.linear_cross_entropy_reference),
        draw.leaves,
        hidden,
        weight,
    )


CHECKS: dict[str, Callable[[Draw, Sizes], float]] = {
    "LoRA with its linear": _lora_linear,
    "LoRA with its linear, some slots": lambda draw, size: _lora_linear(draw, size, some=True),
    "LoRA": _lora,
    "bottleneck": _bottleneck,
    "mixture of LoRA experts": _mixture,
}


def _large_pack(device: torch.device) -> float:
    """Test activations and outputs of more than 2^31 elements, by the last slot, whose offsets exceed 2^31."""
    k, t, d, r = 34, 2**15, 2048, 8
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(k, t, d, generator=generator, device=device, dtype=torch.bfloat16)
    weight = torch.randn(64, d, generator=generator, device=device, dtype=torch.bfloat16) / d**0.5
    a = (torch.randn(k, r, d, generator=generator, device=device) / d**0.5).requires_grad_()
    b = torch.randn(k, 64, r, generator=generator, device=device).requires_grad_()
    up = torch.randn(k, d, r, generator=generator, device=device)
    scale = torch.ones(k, device=device)
    out = lora.packed_lora_linear(x, weight, None, a, b, scale)
    out.sum().backward()
    wide = lora.packed_lora(x, a.detach(), up, scale)
    assert a.grad is not None
    assert b.grad is not None
    x_, a_, b_ = x[-1:].double(), a[-1:].detach().double().requires_grad_(), b[-1:].detach().double().requires_grad_()
    expected = lora.packed_lora_linear_reference(x_, weight.double(), None, a_, b_, scale[-1:].double())
    expected.sum().backward()
    assert a_.grad is not None
    assert b_.grad is not None
    wide_expected = lora.packed_lora_reference(x_, a_.detach(), up[-1:].double(), scale[-1:].double())
    pairs = (
        (out[-1:], expected), (a.grad[-1:], a_.grad), (b.grad[-1:], b_.grad), (wide[-1:], wide_expected)
    )  # fmt: skip
    return max(_error(own, other) for own, other in pairs)


def _large_vocabulary(device: torch.device) -> float:
    """Test a chunk of logits of more than 2^31 elements."""
    rows, features, vocabulary = 17000, 64, 131072
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, features, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocabulary, features, generator=generator, device=device, dtype=torch.bfloat16) / 8
    targets = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    losses, _ = cross_entropy.linear_cross_entropy(hidden, weight, targets, chunk=rows)
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    last = hidden[-64:].detach().float().requires_grad_()
    expected, _ = cross_entropy.linear_cross_entropy_reference(last, weight, targets[-64:])
    (exact,) = torch.autograd.grad(expected.sum(), last)
    return max(_error(losses[-64:], expected), _error(gradient[-64:], exact))


#: Name, test, and the free memory in bytes that it needs.
LARGE: tuple[tuple[str, Callable[[torch.device], float], int], ...] = (
    ("LoRA, large pack", _large_pack, 24 * 2**30),
    ("linear cross-entropy, large chunk", _large_vocabulary, 14 * 2**30),
)
