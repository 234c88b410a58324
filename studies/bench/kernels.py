"""The kernels alone: forward and backward pass of each against its reference, and on a GPU against PyTorch too.

The reference of the mixture, token by token, is nobody's way to compute it: it is measured against a loop over experts,
and against one LoRA of the ranks that a token uses, which is what its operations alone would cost.

A Triton kernel that is not 1.2 times as fast as PyTorch does not earn its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from autopeft.kernels import linear_cross_entropy as cross_entropy
from autopeft.kernels import mixture_lora as mixture
from autopeft.kernels import packed_bottleneck as bottleneck
from autopeft.kernels import packed_lora as lora
from autopeft.kernels import slot_products
from autopeft.studies.bench.arms import Spread, interleaved
from autopeft.studies.bench.loop import now

SLOTS = 8
#: Of a mixture, and those of a token.
EXPERTS, ACTIVE = 16, 2
#: Tokens per slot, features, rank, vocabulary: of the embedded model's order, and of a model of a billion parameters.
SHAPES = {"cpu": (512, 384, 8, 8192), "cuda": (1024, 2048, 16, 131072)}
Pass = Callable[[], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """Times of the reference, and of the same operator without Triton (None: on a CPU it has none), over the kernel's:
    medians of the ratios of neighbours in time, and their quartiles.
    """

    kernel: str
    shape: str
    over_reference: Spread
    over_pytorch: Spread | None


def measure_kernels(device: torch.device) -> tuple[KernelRow, ...]:
    return tuple(
        KernelRow(
            kernel=name,
            shape=shape,
            over_reference=_ratio(reference, kernel, inputs, device),
            over_pytorch=_over_pytorch(kernel, inputs, device),
        )
        for name, shape, inputs, kernel, reference in _cases(device)
    )


def _cases(device: torch.device) -> Iterator[tuple[str, str, list[Tensor], Pass, Pass]]:
    """Name, shape, the tensors of either that want a gradient, kernel and reference."""
    tokens, features, rank, vocabulary = SHAPES[device.type]
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) / shape[-1] ** 0.5).requires_grad_()

    x, weight = draw(SLOTS, tokens, features), draw(features, features).detach()
    a, b = draw(SLOTS, rank, features), draw(SLOTS, features, rank)
    scale = torch.ones(SLOTS, device=device)
    some = torch.arange(0, SLOTS, 2, device=device)
    sizes = f"{SLOTS} slots x {tokens} tokens, {features} to {features}, rank {rank}"

    def linear(op: Callable[..., Tensor], slots: Tensor | None) -> Pass:
        own = slice(None) if slots is None else slots
        return lambda: op(x, weight, None, a[own], b[own], scale[own], None, slots)

    for words, slots in (("", None), (", half of the slots", some)):
        yield (
            f"LoRA with its linear{words}", sizes, [x, a, b],
            linear(lora.packed_lora_linear, slots), linear(lora.packed_lora_linear_reference, slots),
        )  # fmt: skip
    biases = draw(SLOTS, rank), draw(SLOTS, features)

    def adapter(op: Callable[..., Tensor]) -> Pass:
        return lambda: op(x, x, a, biases[0], b, biases[1], scale, None, "gelu")

    yield (
        "bottleneck", sizes, [x, a, b, *biases],
        adapter(bottleneck.packed_bottleneck), adapter(bottleneck.packed_bottleneck_reference),
    )  # fmt: skip
    experts_a, experts_b = draw(SLOTS, EXPERTS, rank, features), draw(SLOTS, EXPERTS, features, rank)
    top = draw(SLOTS, tokens, EXPERTS).detach().topk(ACTIVE)
    gates = torch.zeros(SLOTS, tokens, EXPERTS, device=device).scatter_(2, top.indices, top.values.softmax(2))
    routed = [x, experts_a, experts_b, gates.requires_grad_()]
    used_a, used_b = draw(SLOTS, ACTIVE * rank, features), draw(SLOTS, features, ACTIVE * rank)

    def mixed() -> Tensor:
        return mixture.mixture_lora(x, experts_a, experts_b, gates, scale, None, ACTIVE)

    words = f"{sizes}, {ACTIVE} of {EXPERTS} experts"
    yield "mixture of LoRA experts, over a loop", words, routed, mixed, lambda: _loop_over_experts(*routed)
    yield (
        "mixture of LoRA experts, over one LoRA", words, [*routed, used_a, used_b],
        mixed, lambda: lora.packed_lora(x, used_a, used_b, scale),
    )  # fmt: skip
    hidden, output = draw(SLOTS * tokens, features), draw(vocabulary, features).detach()
    targets = torch.randint(vocabulary, (len(hidden),), generator=generator, device=device)
    yield (
        "linear cross-entropy", f"{len(hidden)} tokens, {features} features, {vocabulary} words", [hidden],
        lambda: cross_entropy.linear_cross_entropy(hidden, output, targets)[0],
        lambda: cross_entropy.linear_cross_entropy_reference(hidden, output, targets)[0],
    )  # fmt: skip


def _loop_over_experts(x: Tensor, a: Tensor, b: Tensor, gates: Tensor) -> Tensor:
    """The mixture as one writes it: every expert takes its tokens, and adds to them."""
    out = []
    for x_k, a_k, b_k, gates_k in zip(x, a, b, gates, strict=True):
        y = torch.zeros_like(x_k)
        for a_e, b_e, gate in zip(a_k, b_k, gates_k.T, strict=True):
            own = gate.nonzero()[:, 0]
            y.index_add_(0, own, x_k.index_select(0, own) @ a_e.T @ b_e.T * gate.index_select(0, own)[:, None])
        out.append(y)
    return torch.stack(out)


def _over_pytorch(kernel: Pass, inputs: list[Tensor], device: torch.device) -> Spread | None:
    if device.type != "cuda" or slot_products.triton is None:
        return None

    def without_triton() -> Tensor:
        with _triton_off():
            return kernel()

    return _ratio(without_triton, kernel, inputs, device)


@contextmanager
def _triton_off() -> Iterator[None]:
    """PyTorch's implementation for CUDA tensors too."""
    triton, slot_products.triton = slot_products.triton, None
    try:
        yield
    finally:
        slot_products.triton = triton


def _ratio(other: Pass, kernel: Pass, inputs: list[Tensor], device: torch.device) -> Spread:
    def seconds(run: Pass) -> float:
        begin = now(device)
        torch.autograd.grad(run().float().sum(), inputs, allow_unused=True)  # the other's own
        return now(device) - begin

    return interleaved(lambda: seconds(other), lambda: seconds(kernel))
