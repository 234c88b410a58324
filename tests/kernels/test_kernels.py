"""Every op of `kernels/` against its reference: output and gradients."""

from __future__ import annotations

import itertools
import re
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

from autopeft.kernels import counts, slot_products
from autopeft.kernels import linear_cross_entropy as cross_entropy_module
from autopeft.kernels import packed_bottleneck as bottleneck_module
from autopeft.kernels import packed_lora as lora_module
from autopeft.kernels import tiles as tile_rules
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
    modules = "autopeft.kernels.packed_lora, autopeft.kernels.packed_bottleneck, autopeft.kernels.linear_cross_entropy"
    code = f"import sys; sys.modules['triton'] = None; import {modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What Triton would launch, seen without a device.

D, FP32, BF16, FP16 = 1024, torch.float32, torch.bfloat16, torch.float16


COMPILED = pytest.mark.skipif(slot_products.INTERPRET, reason="under its interpreter Triton compiles nothing")


class Recorder:
    """In the place of a kernel: keeps arguments in place of a launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((grid, args, options))


def launches(call: Callable[[], object], module: Any, *names: str) -> list[tuple[Any, tuple, tuple, dict]]:
    """Kernel, grid, arguments and options of each launch of these kernels."""
    with pytest.MonkeyPatch.context() as patch:
        recorders = {name: Recorder(getattr(module, name)) for name in names}
        for name, recorder in recorders.items():
            patch.setattr(module, name, recorder)
        call()
    return [(recorder.kernel, *launch) for recorder in recorders.values() for launch in recorder.launches]


def products(rank: int, tokens: int, wide: torch.dtype, narrow: torch.dtype, slots: int = 2) -> list:
    """The launches of a LoRA: shrink with A and with B, expand with B and with A, outer."""
    x, h = torch.empty(slots, tokens, D, dtype=wide), torch.empty(slots, tokens, rank, dtype=narrow)
    a, b = torch.empty(slots, rank, D, dtype=narrow), torch.empty(slots, D, rank, dtype=narrow)
    own = torch.arange(slots)

    def call() -> None:
        for w in (a, b.mT):
            slot_products.triton_shrink(x, w, torch.empty(slots, rank, dtype=narrow), own)
        for w in (b, a.mT):
            slot_products.triton_expand(h, w, x, x, own)
        slot_products.triton_outer(h, x, own)

    return launches(call, slot_products, "_shrink_kernel", "_expand_kernel", "_outer_kernel")


def specialised(kernel: Any, args: tuple, options: dict, arch: int) -> tuple[Any, dict, str]:
    """The source and options that Triton compiles for a launch, and what tells it from others in its cache."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend, options = make_backend(GPUTarget("cuda", arch, 32)), options | {"debug": False}
    bound, specialisation, rest = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **options
    )
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialisation, rest)
    return ASTSource(kernel, signature, constants, attributes), parsed.__dict__, f"{specialisation} {rest}"


#: Of an sm_89; an sm_80 has 163, an sm_90 227.
SHARED_BYTES = 99 * 1024


@pytest.mark.slow
@COMPILED
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("arch", [80, 90])
def test_triton_kernels_fit_a_gpu(arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No device is needed to compile. Neither registers nor shared memory overflow, products are tensor cores' and the
    loads of wide tensors take 16 bytes. Minutes for all; here every bucket of every kind of types, and what is special
    for the default types.
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this Triton comes without cuobjdump")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    seen: set[str] = set()
    cases = [(rank, 1024, *types) for types in ((BF16, FP32), (BF16, BF16), (FP32, FP32)) for rank in (16, 32, 64, 128)]
    cases += [(33, 1024, BF16, FP32), (16, 128, BF16, FP32), (64, 128, BF16, FP32), (16, 1024, FP32, BF16)]
    all_launches = [launch for case in cases for launch in products(*case)]
    for dtype, with_gradient in itertools.product((BF16, FP32), (False, True)):
        all_launches += softmax_launches(2, 32000, dtype, with_gradient)
    for kernel, _, args, options in all_launches:
        source, parsed, key = specialised(kernel, args, options, arch)
        if key in seen:
            continue
        seen.add(key)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=parsed)
        binary, what = tmp_path / "kernel.cubin", f"{kernel.__name__} {parsed['num_warps']} {options} sm_{arch}"
        binary.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
        assert "STACK:0 " in usage.stdout, f"{what} spills registers: {usage.stdout}"
        assert compiled.metadata.shared <= SHARED_BYTES, what
        if "PRODUCT" in options:
            assert "mma" in compiled.asm["ptx"], what
            assert "fma.rn.f32" not in compiled.asm["ptx"], what
            assert re.search(r"cp\.async\S* \[[^]]*\], \[[^]]*\], 0x10|ld\.global\S*\.v4", compiled.asm["ptx"]), what


def softmax_launches(rows: int, vocabulary: int, dtype: torch.dtype, with_gradient: bool, first: int = 0) -> list:
    """Of the softmax of linear cross-entropy, for rows of a larger chunk, from the given one."""
    logits, targets = torch.empty(rows, vocabulary, dtype=dtype), torch.empty(rows + first, dtype=torch.long)[first:]
    losses, correct = torch.empty(2, rows + first)[:, first:]
    return launches(
        lambda: cross_entropy_module._softmax_triton(logits, targets, losses, correct, with_gradient),
        cross_entropy_module,
        "_softmax_kernel",
    )


@COMPILED
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("types", [(BF16, FP32), (BF16, BF16)])
def test_sizes_of_a_minibatch_or_a_pack_compile_nothing_new(types: tuple[torch.dtype, torch.dtype]) -> None:
    """Of one kernel, bucket and type: one variant for ranks that are multiples of 8, so that 16 bytes of them can be
    loaded, and one for others; shrink with A, which is dense along features, has one for all."""
    pytest.importorskip("triton")
    variants: dict[tuple, set[str]] = {}
    for rank in [*range(1, 34), 40, 63, 64, 65, 100, 127, 128, 200, 256]:
        for tokens, slots in ((1, 1), (7, 3), (16, 2), (128, 1)):
            found = products(rank, tokens, *types, slots)
            assert len(found) == 5
            for number, (kernel, _, args, options) in enumerate(found):
                aligned = number > 0 and rank % 8 == 0
                key = specialised(kernel, args, options, 90)[2]
                variants.setdefault((number, tile_rules.bucket(rank), aligned), set()).add(key)
    assert len(variants) == 4 + 4 * 2 * 4
    assert {len(keys) for keys in variants.values()} == {1}


@COMPILED
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_rows_of_a_chunk_compile_nothing_new() -> None:
    pytest.importorskip("triton")
    keys = set()
    for rows, first in ((1, 0), (7, 1), (16, 3), (512, 16)):
        ((kernel, _, args, options),) = softmax_launches(rows, 1024, BF16, True, first)
        keys.add(specialised(kernel, args, options, 90)[2])
    assert len(keys) == 1


def test_tiles_do_not_depend_on_the_pack() -> None:
    """The order in which a slot's tokens are summed is its own, whatever its neighbours are."""
    pytest.importorskip("triton")
    for tokens in (0, 1, 300, 5000):
        alone, packed = (products(20, tokens, BF16, FP32, slots) for slots in (1, 8))
        for (_, grid, args, options), (_, other_grid, other_args, other_options) in zip(alone, packed, strict=True):
            assert grid[:2] == other_grid[:2]
            assert options == other_options
            assert (grid[2], other_grid[2]) == (1, 8)
            assert args[-1] == other_args[-1]  # the chunk, of outer


@pytest.mark.parametrize("features", [1, 896, 4096, 14336])
def test_chunks_of_tokens_are_whole_tiles(features: int) -> None:
    tiles = tile_rules.outer_tiles(16, BF16, FP32, torch.device("cpu"))
    for tokens in (0, 1, 33, 1000, 4096, 10**6):
        chunk = tile_rules.outer_chunk(tokens, features, tiles)
        chunks = -(-tokens // chunk)
        assert chunk >= tiles.tokens
        assert chunk % tiles.tokens == 0
        assert chunks <= tile_rules.PROGRAMS
        assert chunks <= 1 or chunk >= tile_rules.LEAST_CHUNK


def test_how_products_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    kinds = {(BF16, FP32): "pieces", (FP16, FP32): "tf32x3", (FP32, FP32): "tf32x3", (BF16, BF16): "mma"}
    for types, kind in kinds.items():
        assert tile_rules.product_of(*types, cpu) == kind
        for capability in ((8, 0), (8, 9), (9, 0)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, own=capability: own)
            tile_rules._splits_float32.cache_clear()
            assert tile_rules.product_of(*types, gpu) == kind
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        tile_rules._splits_float32.cache_clear()
        older = "mma" if kind == "mma" else "ieee"
        assert tile_rules.product_of(*types, gpu) == older
        assert tile_rules.shrink_tiles(1024, 64, *types, gpu).product == older
    tile_rules._splits_float32.cache_clear()
    assert [tile_rules.bucket(rank) for rank in (1, 16, 17, 33, 64, 65, 128, 500)] == [16, 16, 32, 64, 64] + 3 * [128]


def test_candidates_are_few_and_start_with_the_rule() -> None:
    for rank, types in itertools.product((1, 32, 64, 128), ((BF16, FP32), (BF16, BF16), (FP32, FP32))):
        tiles = tile_rules.shrink_tiles(1024, rank, *types, torch.device("cpu"))
        candidates = tile_rules.candidate_tiles(tiles)
        assert candidates[0] == tiles
        assert 3 <= len(set(candidates)) == len(candidates) <= 6
        assert all(min(own.tokens, own.features, own.ranks) >= 16 and own.stages >= 1 for own in candidates)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(slot_products, "INTERPRET", True)
    x = torch.zeros(1)
    assert slot_products.by_triton(x, None)
    assert not slot_products.by_triton(x, x.double())
    with pytest.raises(RuntimeError, match="restored"), slot_products.without_triton():
        assert not slot_products.by_triton(x)
        raise RuntimeError("restored")
    assert slot_products.by_triton(x)


# Counts.


def test_bytes_by_hand() -> None:
    """2 slots, 3 tokens, 5 features, rank 7; bfloat16 beside float32."""
    sizes = (2, 3, 5, 7, BF16, FP32)
    flops = 2 * 2 * 3 * 5 * 7
    x, w, h = 2 * 15 * 2, 2 * 35 * 4, 2 * 21 * 4
    assert counts.shrink_count(*sizes) == counts.Count(flops, x + w + h + 2 * 7 * 4)
    assert counts.shrink_count(*sizes, factor=False).nbytes == x + w + h
    assert counts.expand_count(*sizes) == counts.Count(flops, h + w + 2 * x)
    assert counts.expand_count(*sizes, base=False).nbytes == h + w + x
    assert counts.outer_count(*sizes) == counts.Count(flops, h + x + w)
    assert counts.outer_count(*sizes, chunks=2).nbytes == h + x + w + 2 * 2 * w
    assert counts.matmul_count(6, 5, 4, BF16) == counts.Count(240, 2 * (30 + 20 + 24))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("needs_x", [False, True])
def test_counts_are_what_runs(linear: bool, needs_x: bool) -> None:
    """PyTorch's products, one by one, as its own counter sees them: all but those in place (of equal types)."""
    wide, narrow = Draw(dtype=FP32), Draw()
    x, a, b = wide.constant(3 if linear else 2, 5, 7), narrow.constant(2, 4, 7), narrow.constant(2, 9, 4)
    weight, slots = (wide.constant(9, 7), torch.tensor([2, 0])) if linear else (None, None)
    gy, h, factor = wide.constant(len(x), 5, 9), narrow.constant(2, 5, 4), narrow.constant(2, 4)
    shapes = (x.shape, a.shape, b.shape, linear)
    with FlopCounterMode(display=False) as counter:
        lora_module._packed_lora._init_fn(x, weight, None, a, b, factor, slots)
    assert lora_module.packed_lora_count(*shapes).flops == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        lora_module._packed_lora_backward._init_fn(gy, x, weight, a, b, factor, slots, h, needs_x)
    assert lora_module.packed_lora_backward_count(*shapes, needs_x).flops == counter.get_total_flops()


def test_bytes_of_a_lora_by_hand() -> None:
    """The default types; 3 slots of 5 tokens, 2 of them served, 7 to 9 features, rank 4."""
    shapes = ((3, 5, 7), (2, 4, 7), (2, 9, 4))
    x, y, weight, a, b, h = 2 * 105, 2 * 135, 2 * 63, 4 * 56, 4 * 72, 4 * 40
    of_x, of_y, factor = x * 2 // 3, y * 2 // 3, 4 * 8
    forward = (x + weight + y) + (of_x + a + factor + h) + (h + b + 2 * of_y)
    assert lora_module.packed_lora_count(*shapes, linear=True).nbytes == forward
    backward = (of_y + b + factor + h) + (h + of_x + a) + (h + of_y + b)
    assert lora_module.packed_lora_backward_count(*shapes, linear=True, needs_x=False).nbytes == backward
    below = (y + weight + x) + (h + a + 2 * of_x)
    assert lora_module.packed_lora_backward_count(*shapes, linear=True).nbytes == backward + below
