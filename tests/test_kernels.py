"""Every op of `kernels/` against its reference: output and gradients."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from autopeft.kernels import packed_bottleneck as bottleneck_module
from autopeft.kernels import packed_lora as lora_module
from autopeft.kernels.packed_bottleneck import ACTIVATIONS, packed_bottleneck, packed_bottleneck_reference
from autopeft.kernels.packed_lora import (
    packed_lora,
    packed_lora_linear,
    packed_lora_linear_reference,
    packed_lora_reference,
)


class Draw:
    """Random tensors. Those with a gradient are kept, in the order in which they are drawn."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.double) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype
        self.leaves: list[Tensor] = []

    def constant(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.double).to(self.dtype)

    def __call__(self, *shape: int) -> Tensor:
        self.leaves.append(self.constant(*shape).requires_grad_())
        return self.leaves[-1]

    def strided(self, *shape: int) -> Tensor:
        """A slice of a wider tensor, its first two axes swapped."""
        k, t, d = shape
        return self(t, k, d + 2)[..., 1:-1].transpose(0, 1)

    def scale(self, slots: int) -> Tensor:
        return self.constant(slots).abs() + 0.5


def mask_of(ranks: tuple[int, ...], dtype: torch.dtype = torch.double) -> Tensor | None:
    if len(set(ranks)) == 1:
        return None
    return (torch.arange(max(ranks))[None, :] < torch.tensor(ranks)[:, None]).to(dtype)


def assert_same(op: Callable[..., Tensor], reference: Callable[..., Tensor], draw: Draw, *args: Any) -> None:
    """Output and the gradient of every leaf that was drawn."""
    weight = None
    results = []
    for function in (op, reference):
        out = function(*args)
        weight = draw.constant(*out.shape) if weight is None else weight
        results.append([out, *torch.autograd.grad((out * weight).sum(), draw.leaves)])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected)


RANKS = pytest.mark.parametrize("ranks", [(1,), (4, 4), (1, 3, 7)])


@RANKS
def test_packed_lora_is_its_reference(ranks: tuple[int, ...]) -> None:
    k, r, draw = len(ranks), max(ranks), Draw()
    x, a, b = draw.strided(k, 5, 11), draw(k, r, 11), draw(k, 9, r)
    assert_same(packed_lora, packed_lora_reference, draw, x, a, b, draw.scale(k), mask_of(ranks))


@RANKS
@pytest.mark.parametrize("served", ["all", "some"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_lora_linear_is_its_reference(ranks: tuple[int, ...], served: str, with_bias: bool) -> None:
    s, r, draw = len(ranks), max(ranks), Draw()
    slots = torch.tensor([3, 0, 2][:s]) if served == "some" else None
    x, a, b = draw.strided(s if slots is None else 5, 5, 11), draw(s, r, 11), draw(s, 9, r)
    weight, bias = draw.constant(11, 9).T, draw.constant(9) if with_bias else None
    args = (x, weight, bias, a, b, draw.scale(s), mask_of(ranks), slots)
    assert_same(packed_lora_linear, packed_lora_linear_reference, draw, *args)


@RANKS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", ["serial", "parallel", "update alone"])
def test_packed_bottleneck_is_its_reference(ranks: tuple[int, ...], activation: str, form: str) -> None:
    k, r, draw = len(ranks), max(ranks), Draw()
    d_z, d = (9, 9) if form == "serial" else (11, 9)
    z = draw.strided(k, 5, d_z)
    y = {"serial": lambda: z, "parallel": lambda: draw.strided(k, 5, d), "update alone": lambda: None}[form]()
    weights = (draw(k, r, d_z), draw(k, r), draw(k, d, r), draw(k, d))
    args = (z, y, *weights, draw.scale(k), mask_of(ranks), activation)
    assert_same(packed_bottleneck, packed_bottleneck_reference, draw, *args)


sizes = st.integers(1, 9)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=3), sizes, sizes, sizes)
def test_lora_of_any_shape(data: st.DataObject, ranks: list[int], t: int, d_in: int, d_out: int) -> None:
    s, r, draw = len(ranks), max(ranks), Draw()
    slots = data.draw(st.none() | st.permutations(range(s + 2)).map(lambda order: torch.tensor(order[:s])))
    x, a, b = draw(s if slots is None else s + 2, t, d_in), draw(s, r, d_in), draw(s, d_out, r)
    weight, bias = draw.constant(d_out, d_in), draw.constant(d_out) if data.draw(st.booleans()) else None
    args = (x, weight, bias, a, b, draw.scale(s), mask_of(tuple(ranks)), slots)
    assert_same(packed_lora_linear, packed_lora_linear_reference, draw, *args)
    if slots is None:
        assert_same(packed_lora, packed_lora_reference, draw, x, a, b, draw.scale(s), mask_of(tuple(ranks)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), sizes, sizes, sizes, st.sampled_from(list(ACTIVATIONS)))
def test_bottleneck_of_any_shape(ranks: list[int], t: int, d_z: int, d: int, activation: str) -> None:
    k, r, draw = len(ranks), max(ranks), Draw()
    weights = (draw(k, r, d_z), draw(k, r), draw(k, d, r), draw(k, d))
    args = (draw(k, t, d_z), draw(k, t, d), *weights, draw.scale(k), mask_of(tuple(ranks)), activation)
    assert_same(packed_bottleneck, packed_bottleneck_reference, draw, *args)


def root_mean_square_ratio(ours: Tensor, expected: Tensor) -> float:
    ours, expected = ours.detach().double(), expected.detach().double()
    return float((ours - expected).norm() / expected.norm())


@pytest.mark.parametrize("adapter_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("served", ["all", "some"])
def test_lora_on_a_bfloat16_backbone(adapter_type: torch.dtype, served: str) -> None:
    wide, narrow = Draw(0, torch.bfloat16), Draw(1, adapter_type)
    slots = torch.tensor([2, 0]) if served == "some" else None
    x, weight, bias = wide(3 if slots is not None else 2, 40, 33), wide.constant(35, 33), wide.constant(35)
    a, b, scale, mask = narrow(2, 5, 33), narrow(2, 35, 5), narrow.scale(2), mask_of((5, 2), adapter_type)
    leaves = [x, a, b]
    out = packed_lora_linear(x, weight, bias, a, b, scale, mask, slots)
    ours = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, adapter_type, adapter_type]
    x, a, b = (leaf.detach().float().requires_grad_() for leaf in leaves)
    args = (x, weight.float(), bias.float(), a, b, scale.float(), mask.float(), slots)
    expected = packed_lora_linear_reference(*args)
    expected = [expected, *torch.autograd.grad(expected, [x, a, b], torch.ones_like(expected))]
    for mine, exact in zip(ours, expected, strict=True):
        assert root_mean_square_ratio(mine, exact) <= 1e-2


@pytest.mark.parametrize("adapter_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("serial", [False, True])
def test_bottleneck_on_a_bfloat16_backbone(adapter_type: torch.dtype, serial: bool) -> None:
    wide, narrow = Draw(0, torch.bfloat16), Draw(1, adapter_type)
    z = wide(2, 40, 33)
    y = z if serial else wide(2, 40, 33)
    narrow(2, 5, 33), narrow(2, 5), narrow(2, 33, 5), narrow(2, 33)
    scale, mask = narrow.scale(2), mask_of((5, 2), adapter_type)
    leaves = [*wide.leaves, *narrow.leaves]
    out = packed_bottleneck(z, y, *narrow.leaves, scale, mask, "silu")
    ours = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    assert [t.dtype for t in ours] == [torch.bfloat16, *(leaf.dtype for leaf in leaves)]
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    args = (exact[0], exact[0] if serial else exact[1], *exact[-4:], scale.float(), mask.float(), "silu")
    reference = packed_bottleneck_reference(*args)
    expected = [reference, *torch.autograd.grad(reference, exact, torch.ones_like(reference))]
    for mine, theirs in zip(ours, expected, strict=True):
        assert root_mean_square_ratio(mine, theirs) <= 1e-2


@pytest.mark.parametrize("served", ["all", "some"])
@pytest.mark.parametrize("alone", [False, True])
def test_packed_lora_is_a_proper_operator(alone: bool, served: str) -> None:
    draw = Draw(dtype=torch.float)
    slots = torch.tensor([2, 0]) if served == "some" and not alone else None
    x, a, b, factor = draw(2 if slots is None else 3, 5, 7), draw(2, 3, 7), draw(2, 9, 3), draw.constant(2, 3)
    weight, bias = (None, None) if alone else (draw.constant(9, 7), draw.constant(9))
    torch.library.opcheck(lora_module._packed_lora, (x, weight, bias, a, b, factor, slots))
    torch.library.opcheck(lora_module._packed_lora, (x.detach(), weight, bias, a, b, factor, slots))
    h, gy = draw.constant(2, 5, 3), draw.constant(len(x), 5, 9)
    rest = [None if t is None else t.detach() for t in (x, weight, a, b, factor, slots)]
    for needs_x in (False, True):
        torch.library.opcheck(lora_module._packed_lora_backward, (gy, *rest, h, needs_x))


@pytest.mark.parametrize("form", ["serial", "parallel", "update alone"])
def test_packed_bottleneck_is_a_proper_operator(form: str) -> None:
    draw = Draw(dtype=torch.float)
    z, y = draw(2, 5, 9), draw(2, 5, 9) if form == "parallel" else None
    weights = (draw(2, 3, 9), draw(2, 3), draw(2, 9, 3), draw(2, 9))
    factor, serial = draw.constant(2, 4), form == "serial"
    torch.library.opcheck(bottleneck_module._packed_bottleneck, (z, y, *weights, factor, "gelu", serial))
    z, down, up = z.detach(), weights[0].detach(), weights[2].detach()
    gy, s = draw.constant(2, 5, 9), draw.constant(2, 5, 3)
    for needs_z in (False, True):
        arguments = (gy, z, down, up, factor, s, "gelu", serial, needs_z)
        torch.library.opcheck(bottleneck_module._packed_bottleneck_backward, arguments)


def test_the_lowest_adapter_computes_no_gradient_below_it() -> None:
    draw = Draw(dtype=torch.float)
    weight, a, b, scale = draw.constant(9, 7), draw(2, 3, 7), draw(2, 9, 3), draw.scale(2)
    wide, narrow = 2 * 10 * 9 * 7, 2 * 10 * 3 * (9 + 7)
    for x, gx in ((draw.constant(2, 5, 7), 0), (draw(2, 5, 7), wide + 2 * 10 * 3 * 7)):
        with FlopCounterMode(display=False) as counter:
            out = packed_lora_linear(x, weight, None, a, b, scale)
        assert counter.get_total_flops() == wide + narrow
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == narrow + 2 * 10 * 3 * 9 + gx


def test_importing_needs_no_triton() -> None:
    modules = "autopeft.kernels.packed_lora, autopeft.kernels.packed_bottleneck"
    code = f"import sys; sys.modules['triton'] = None; import {modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_triton_kernels_compile_for_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No device is needed to compile, and the interpreter forgives what the compiler does not."""
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget

    from autopeft.kernels import slot_products

    blocks = slot_products._blocks(20) | {"INTERPRET": False}
    for adapter, backbone in itertools.product(("fp32", "bf16"), repeat=2):
        pointers = {
            slot_products._shrink_kernel: {"x": backbone, "w": adapter, "factor": adapter, "h": adapter},
            slot_products._expand_kernel: {"h": adapter, "w": adapter, "base": backbone, "y": backbone},
            slot_products._outer_kernel: {"h": adapter, "x": backbone, "partial": "fp32"},
        }
        for kernel, types in pointers.items():
            constants = {
                name: n for name, n in (blocks | {"CHUNK_T": slot_products.CHUNK_T}).items() if name in kernel.arg_names
            }
            signature = {
                name: "constexpr" if name in constants else f"*{types[name]}" if name in types else "i32"
                for name in kernel.arg_names
            } | {"slots": "*i64"}
            source = triton.compiler.ASTSource(kernel, signature, constants)
            triton.compile(source, target=GPUTarget("cuda", 90, 32))
