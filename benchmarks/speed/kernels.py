"""The kernels alone: forward and backward pass of each against its reference, and on a GPU against PyTorch too.

The reference of the mixture, token by token, is unrealistically slow: the mixture is compared with a loop over experts,
and with one LoRA of the active rank, a lower bound by its operations.

PyTorch's time is that of the better one of two ways: its batched products with autograd, as a user would write them,
and our own operators without Triton. A Triton kernel that is not 1.2 times as fast is not worth its code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopeft.evaluators.costs.timing import Spread, interleaved, now
from autopeft.kernels import linear_cross_entropy as cross_entropy
from autopeft.kernels import mixture_lora as mixture
from autopeft.kernels import packed_bottleneck as bottleneck
from autopeft.kernels import packed_lora as lora
from autopeft.kernels import slot_products

SLOTS = 8
#: Experts of a mixture, and active experts of a token.
EXPERTS, ACTIVE = 16, 2
#: Tokens per slot, features, rank, vocabulary: about those of the embedded model, and of one with a billion parameters.
SHAPES = {"cpu": (512, 384, 8, 8192), "cuda": (1024, 2048, 16, 131072)}
Pass = Callable[[], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCase:
    """A kernel at one shape, and other ways to the same result, each a forward pass that may be called repeatedly.

    `inputs`: the tensors that require a gradient; `reference` may read only some of them. `reference`: the obvious way,
    slot by slot in float32 (of the mixture over one LoRA: that LoRA, which has another result). `batched`: PyTorch's
    own, see above. `kernel` and `batched` return the type of the wide tensors, or losses [tokens]. `pull`: the gradient
    of the result that a backward pass starts from.
    """

    name: str
    shape: str
    inputs: list[Tensor]
    kernel: Pass
    reference: Pass
    batched: Pass
    pull: Tensor

    def gradients(self, run: Pass) -> tuple[Tensor | None, ...]:
        """Run one of the ways forward and backward; return the gradients of `inputs`, None where it reads none."""
        out = run()
        return torch.autograd.grad(out, self.inputs, self.pull.to(out.dtype), allow_unused=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """Times of the reference, and of PyTorch's better way (None: not measured on a CPU), over the kernel's.

    Medians of the ratios of consecutive measurements, and their quartiles.
    """

    kernel: str
    shape: str
    over_reference: Spread
    over_pytorch: Spread | None


def measure_kernels(device: torch.device) -> tuple[KernelRow, ...]:
    """Measure every case of `kernel_cases`."""
    return tuple(
        KernelRow(
            kernel=case.name,
            shape=case.shape,
            over_reference=interleaved(
                partial(_seconds, case.reference, case, device), partial(_seconds, case.kernel, case, device)
            ),
            over_pytorch=_over_pytorch(case, device),
        )
        for case in kernel_cases(device)
    )


def kernel_cases(
    device: torch.device,
    shapes: tuple[int, int, int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
) -> Iterator[KernelCase]:
    """Yield every kernel at its shape, with tensors on `device`.

    `shapes`: tokens per slot, features, rank, vocabulary (None: those of `SHAPES`). `dtype`: of the backbone's wide
    tensors. `adapter_dtype`: of adapters and gates.
    """
    tokens, features, rank, vocabulary = shapes or SHAPES[device.type]
    generator = torch.Generator(device).manual_seed(0)

    def draw(kind: torch.dtype, *shape: int) -> Tensor:
        drawn: Tensor = torch.randn(shape, generator=generator, device=device) / shape[-1] ** 0.5
        return drawn.to(kind).requires_grad_()

    x, weight = draw(dtype, SLOTS, tokens, features), draw(dtype, features, features).detach()
    # Dense: the gradient of a sum is one number for all elements, and would be read from the cache.
    pull = draw(dtype, SLOTS, tokens, features).detach()
    a, b = draw(adapter_dtype, SLOTS, rank, features), draw(adapter_dtype, SLOTS, features, rank)
    scale = torch.ones(SLOTS, dtype=adapter_dtype, device=device)
    some = torch.arange(0, SLOTS, 2, device=device)
    sizes = f"{SLOTS} slots x {tokens} tokens, {features} to {features}, rank {rank}"

    def linear(op: Callable[..., Tensor], slots: Tensor | None) -> Pass:
        own = slice(None) if slots is None else slots
        return lambda: op(x, weight, None, a[own], b[own], scale[own], None, slots)

    def batched_linear(slots: Tensor | None) -> Pass:
        own = slice(None) if slots is None else slots
        return lambda: _lora_linear(x, weight, a[own], b[own], scale[own], slots)

    for words, slots in (("", None), (", half of the slots", some)):
        yield KernelCase(
            name=f"LoRA with its linear{words}",
            shape=sizes,
            inputs=[x, a, b],
            kernel=linear(lora.packed_lora_linear, slots),
            reference=linear(_in_float32(lora.packed_lora_linear_reference), slots),
            batched=batched_linear(slots),
            pull=pull,
        )
    biases = draw(adapter_dtype, SLOTS, rank), draw(adapter_dtype, SLOTS, features)

    def adapter(op: Callable[..., Tensor]) -> Pass:
        return lambda: op(x, x, a, biases[0], b, biases[1], scale, None, "gelu")

    yield KernelCase(
        name="bottleneck",
        shape=sizes,
        inputs=[x, a, b, *biases],
        kernel=adapter(bottleneck.packed_bottleneck),
        reference=adapter(_in_float32(bottleneck.packed_bottleneck_reference)),
        batched=lambda: _bottleneck(x, a, biases[0], b, biases[1], scale),
        pull=pull,
    )
    experts_a = draw(adapter_dtype, SLOTS, EXPERTS, rank, features)
    experts_b = draw(adapter_dtype, SLOTS, EXPERTS, features, rank)
    top = draw(adapter_dtype, SLOTS, tokens, EXPERTS).detach().topk(ACTIVE)
    gates = torch.zeros(SLOTS, tokens, EXPERTS, dtype=adapter_dtype, device=device)
    gates.scatter_(2, top.indices, top.values.softmax(2)).requires_grad_()
    used_a = draw(adapter_dtype, SLOTS, ACTIVE * rank, features)
    used_b = draw(adapter_dtype, SLOTS, features, ACTIVE * rank)
    routed, words = [x, experts_a, experts_b, gates], f"{sizes}, {ACTIVE} of {EXPERTS} experts"

    def mixed() -> Tensor:
        return mixture.mixture_lora(x, experts_a, experts_b, gates, scale, None, ACTIVE)

    def gated() -> Tensor:
        return _mixture(x, experts_a, experts_b, gates, scale)

    yield KernelCase(
        name="mixture of LoRA experts, over a loop",
        shape=words,
        inputs=routed,
        kernel=mixed,
        reference=lambda: _in_float32(_loop_over_experts)(*routed),
        batched=gated,
        pull=pull,
    )
    yield KernelCase(
        name="mixture of LoRA experts, over one LoRA",
        shape=words,
        inputs=[*routed, used_a, used_b],
        kernel=mixed,
        reference=lambda: lora.packed_lora(x, used_a, used_b, scale),
        batched=gated,
        pull=pull,
    )
    hidden, output = draw(dtype, SLOTS * tokens, features), draw(dtype, vocabulary, features).detach()
    targets = torch.randint(vocabulary, (len(hidden),), generator=generator, device=device)
    yield KernelCase(
        name="linear cross-entropy",
        shape=f"{len(hidden)} tokens, {features} features, {vocabulary} words",
        inputs=[hidden],
        kernel=lambda: cross_entropy.linear_cross_entropy(hidden, output, targets)[0],
        reference=lambda: cross_entropy.linear_cross_entropy_reference(hidden, output, targets)[0],
        batched=lambda: _linear_cross_entropy(hidden, output, targets),
        pull=draw(torch.float32, SLOTS * tokens).detach(),
    )


def _in_float32(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute in float32 and round the result to the type of the first argument: references take one type."""

    def wide(x: Tensor, *others: Any) -> Tensor:
        found = reference(x.float(), *(t.float() if _is_real(t) else t for t in others))
        return found.to(x.dtype)

    return wide


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _loop_over_experts(x: Tensor, a: Tensor, b: Tensor, gates: Tensor) -> Tensor:
    """Compute the mixture in a loop in which every expert gathers its tokens and adds to them."""
    out = []
    for x_k, a_k, b_k, gates_k in zip(x, a, b, gates, strict=True):
        y = torch.zeros_like(x_k)
        for a_e, b_e, gate in zip(a_k, b_k, gates_k.T, strict=True):
            own = gate.nonzero()[:, 0]
            y.index_add_(0, own, x_k.index_select(0, own) @ a_e.T @ b_e.T * gate.index_select(0, own)[:, None])
        out.append(y)
    return torch.stack(out)


# PyTorch's own way. As in peft, x is cast to the adapter's type, and the result is cast back and added. Scales are on
# the narrow side, where they cost the least.


def _lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor, slots: Tensor | None) -> Tensor:
    """Compute `packed_lora_linear`; with `slots`, from a copy of their rows."""
    y = F.linear(x, weight)
    served = x if slots is None else x.index_select(0, slots)
    h = torch.bmm(served.to(a.dtype), a.mT) * scale[:, None, None]
    update = torch.bmm(h, b.mT).to(y.dtype)
    return y + update if slots is None else y.index_add_(0, slots, update)


def _bottleneck(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, scale: Tensor) -> Tensor:
    """Compute `packed_bottleneck` in its serial form, with gelu."""
    scale = scale[:, None, None]
    h = F.gelu(torch.baddbmm(down_bias[:, None], x.to(down.dtype), down.mT)) * scale
    return x + torch.baddbmm(up_bias[:, None] * scale, h, up.mT).to(x.dtype)


def _mixture(x: Tensor, a: Tensor, b: Tensor, gates: Tensor, scale: Tensor) -> Tensor:
    """Compute `mixture_lora` as one LoRA of the ranks of all experts, weighted by the gates."""
    h: Tensor = torch.bmm(x.to(a.dtype), a.flatten(1, 2).mT).unflatten(2, a.shape[1:3])  # [K, T, E, R]
    h = h * (gates * scale[:, None, None])[..., None]
    return torch.bmm(h.flatten(2), b.mT.flatten(1, 2)).to(x.dtype)


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute losses [M], by PyTorch's operation for them where it has one: 2.13 does."""
    if hasattr(F, "linear_cross_entropy"):
        losses: Tensor = F.linear_cross_entropy(hidden, weight, targets, reduction="none")
        return losses
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


# Time


def _over_pytorch(case: KernelCase, device: torch.device) -> Spread | None:
    if device.type != "cuda" or not slot_products.has_triton():
        return None

    def without_triton() -> float:
        with slot_products.without_triton():  # around the backward pass too
            return _seconds(case.kernel, case, device)

    ways = without_triton, partial(_seconds, case.batched, case, device)
    found = [interleaved(way, partial(_seconds, case.kernel, case, device)) for way in ways]
    return min(found, key=lambda spread: spread.median)


def _seconds(run: Pass, case: KernelCase, device: torch.device) -> float:
    """Measure the seconds of a forward and a backward pass."""
    begin = now(device)
    case.gradients(run)
    return now(device) - begin
