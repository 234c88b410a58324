"""(d) Speed of every kernel at real shapes.

Kernels are compared with PyTorch's best way and with the bounds by their bytes and operations, and the tiles that the
rule chose with their neighbours. Device times are those of CUDA graphs, for the products alone over more sets of inputs
than fit in the cache; the operators' times by the host's clock are reported too, because a step of small minibatches
waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autopeft.benchmarks.gpu.clock import device_seconds, host_seconds, seconds_of
from autopeft.benchmarks.gpu.models import free_memory
from autopeft.benchmarks.gpu.phase import ResultRow, Run
from autopeft.benchmarks.speed.kernels import KernelCase, kernel_cases
from autopeft.evaluators.costs.timing import interleaved
from autopeft.kernels import counts, slot_products
from autopeft.kernels import linear_cross_entropy as cross_entropy
from autopeft.kernels import tiles as tile_rules
from autopeft.kernels.counts import Count
from autopeft.kernels.tiles import Tiles

#: Types of the backbone and of the adapters: the default first.
TYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "bf16 + fp32": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
}
#: Tokens per slot, features, rank, vocabulary: of the models with 0.5B, 3B and 8B parameters, few tokens and many.
OPERATORS = ((1024, 2048, 16, 151936), (128, 896, 16, 151936), (1024, 4096, 16, 128256), (1024, 4096, 64, 128256))
#: Tokens per slot, features, rank of the products alone.
PRODUCTS = ((1024, 4096, 16), (128, 896, 16), (1024, 2048, 64), (2048, 14336, 16), (1024, 4096, 128))
#: Tokens, features, vocabulary.
HEADS = ((8192, 2048, 151936), (1024, 896, 151936))
TOY_OPERATORS, TOY_PRODUCTS, TOY_HEADS = ((4, 16, 2, 64),), ((4, 16, 2),), ((8, 16, 64),)
SLOTS = 8
#: Size of the sets of inputs, in caches: no set is still cached at its next turn.
CACHES = 2.5
REPEATS = 7
#: Least speed-up over PyTorch with which a Triton kernel stays.
WANTED = 1.2


def measure(run: Run) -> Iterator[ResultRow]:
    """Yield one row per operator or product, types and shape, with its times."""
    device = torch.device(run.device)
    operators = TOY_OPERATORS if run.toy else OPERATORS
    products, heads = (TOY_PRODUCTS, TOY_HEADS) if run.toy else (PRODUCTS, HEADS)
    # Most valuable first: the default types at every shape, then the products, then the other types.
    default, *others = TYPES
    yield from _operators(run, device, default, operators)
    for size in products:
        yield from _products(run, device, default, _narrow_products(device, default, *size))
    for size in heads:
        yield from _products(run, device, default, _heads(device, default, *size))
    for types in () if run.toy else others:
        yield from _operators(run, device, types, operators[:1])
        yield from _products(run, device, types, _narrow_products(device, types, *products[0]))


def _operators(
    run: Run, device: torch.device, types: str, shapes: tuple[tuple[int, int, int, int], ...]
) -> Iterator[ResultRow]:
    for shape in shapes:
        seen: set[Callable[[], Tensor]] = set()  # the mixture has two cases, with two references
        for case in kernel_cases(device, shape, *TYPES[types]):
            if case.kernel in seen:
                continue
            seen.add(case.kernel)
            what = f"{case.name}, {types}, {case.shape}"
            if not run.has_time(what, 8.0):
                continue
            name, _, _ = case.name.partition(", over")  # the reference is not used here
            row: ResultRow = {"what": "operator", "kernel": name, "types": types, "shape": case.shape, "wanted": WANTED}
            try:
                yield row | _operator(case, device, 2 if run.toy else REPEATS)
            except Exception as error:  # such as too large for this card: the others go on
                yield row | {"error": f"{type(error).__name__}: {error}"[:1000]}
            free_memory()


def _operator(case: KernelCase, device: torch.device, repeats: int) -> ResultRow:
    """Measure forward and backward pass by Triton, PyTorch's batched products, and our operator without Triton."""

    def without_triton() -> Any:
        with slot_products.without_triton():
            return case.gradients(case.kernel)

    ways: dict[str, Callable[[], Any]] = {
        "kernel": partial(case.gradients, case.kernel),
        "batched": partial(case.gradients, case.batched),
        "without_triton": without_triton,
    }

    found: ResultRow = {f"{name}_s": host_seconds(way, device, repeats) for name, way in ways.items()}
    best = min(("batched", "without_triton"), key=lambda name: found[f"{name}_s"])
    over = interleaved(
        partial(seconds_of, ways[best], device), partial(seconds_of, ways["kernel"], device), repeats=repeats
    )
    found |= {
        "pytorchs_best": best,
        "over_pytorch": over.median,
        "over_pytorch_low": over.low,
        "over_pytorch_high": over.high,
    }
    for name, way in ways.items():
        try:
            found[f"{name}_device_s"] = device_seconds([way], device)
        except Exception as error:  # a way that waits for the device cannot be captured
            found[f"{name}_device_note"] = f"{type(error).__name__}: {error}"[:200]
    pytorch_s = [found[f"{name}_device_s"] for name in ("batched", "without_triton") if f"{name}_device_s" in found]
    if pytorch_s and "kernel_device_s" in found:
        found["device_over_pytorch"] = min(pytorch_s) / found["kernel_device_s"]
    return found


@dataclass(frozen=True, slots=True)
class Product:
    """A kernel alone.

    `ways`: choices of tiles, the rule's first, each with calls over sets of inputs. `count`: least operations and
    bytes.
    """

    name: str
    shape: str
    count: Count
    ways: Mapping[str, Sequence[Callable[[], object]]]


def _products(run: Run, device: torch.device, types: str, made: Iterable[Product]) -> Iterator[ResultRow]:
    for product in made:
        if not run.has_time(f"{product.name}, {types}, {product.shape}", 6.0):
            continue
        row: ResultRow = {"what": "product", "product": product.name, "types": types, "shape": product.shape}
        row |= asdict(product.count)
        times: dict[str, float] = {}
        for way, calls in product.ways.items():
            try:
                times[way] = device_seconds(calls, device)
            except Exception as error:  # tiles that do not fit this card
                row.setdefault("refused", {})[way] = f"{type(error).__name__}: {error}"[:200]
        if times:
            rule, best = next(iter(times)), min(times, key=lambda way: times[way])
            row |= {"device_s": times[rule], "way": rule, "best_s": times[best], "best_way": best}
        yield row
        free_memory()


def _narrow_products(device: torch.device, types: str, tokens: int, features: int, rank: int) -> Iterator[Product]:
    """Yield the three products of packed adapters, with the rule's tiles and their neighbours."""
    wide, narrow = TYPES[types]
    draw = _draw(device)
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    sets = 1 + int(CACHES * cache_bytes / (SLOTS * tokens * features * wide.itemsize))
    xs = [draw(wide, SLOTS, tokens, features) for _ in range(sets)]
    w, h, up = (
        draw(narrow, SLOTS, rank, features),
        draw(narrow, SLOTS, tokens, rank),
        draw(narrow, SLOTS, features, rank),
    )
    factor = draw(narrow, SLOTS, rank)
    sizes = (SLOTS, tokens, features, rank, wide, narrow)
    products = (
        (
            "shrink",
            counts.shrink_count(*sizes),
            tile_rules.shrink_tiles(tokens, rank, wide, narrow, device),
            lambda x, tiles: slot_products.triton_shrink(x, w, factor, None, tiles),
        ),
        (
            "expand",
            counts.expand_count(*sizes),
            tile_rules.expand_tiles(rank, narrow, device),
            lambda x, tiles: slot_products.triton_expand(h, up, x, x, None, tiles),
        ),
        (
            "outer",
            counts.outer_count(*sizes),
            tile_rules.outer_tiles(rank, wide, narrow, device),
            lambda x, tiles: slot_products.triton_outer(h, x, None, tiles),
        ),
    )
    shape = f"{SLOTS} slots x {tokens} tokens, {features} features, rank {rank}"
    for name, count, rule, way in products:
        ways = {_words(tiles): [partial(way, x, tiles) for x in xs] for tiles in tile_rules.candidate_tiles(rule)}
        yield Product(name, shape, count, ways)


def _words(tiles: Tiles) -> str:
    sizes = f"{tiles.tokens} x {tiles.features} x {tiles.ranks}"
    return f"{sizes}, {tiles.warps} warps, {tiles.stages} stages, {tiles.product}"


def _heads(device: torch.device, types: str, tokens: int, features: int, vocabulary: int) -> Iterator[Product]:
    """Yield the softmax of linear cross-entropy at several blocks, and all of it at several chunks."""
    dtype, _ = TYPES[types]
    draw = _draw(device)
    rows = min(tokens, cross_entropy.chunk_rows(vocabulary, device))
    targets = torch.arange(tokens, device=device) % vocabulary
    losses, correct = torch.empty(2, rows, device=device)
    logits = draw(dtype, rows, vocabulary)
    yield Product(
        "softmax of a chunk",
        f"{rows} tokens, {vocabulary} words",
        cross_entropy.softmax_count(rows, vocabulary, dtype),
        {
            f"block {block or 'by rule'}": [
                partial(cross_entropy._softmax_triton, logits, targets[:rows], losses, correct, True, block=block)
            ]
            for block in (None, 1024, 2048, 8192)
        },
    )
    hidden, weight = draw(dtype, tokens, features).requires_grad_(), draw(dtype, vocabulary, features)
    yield Product(
        "linear cross-entropy by chunk",
        f"{tokens} tokens, {features} features, {vocabulary} words",
        cross_entropy.linear_cross_entropy_count(tokens, features, vocabulary, dtype, rows),
        {
            f"{chunk} tokens": [partial(cross_entropy.linear_cross_entropy, hidden, weight, targets, chunk=chunk)]
            for chunk in dict.fromkeys((rows, 256, 512, 1024, 2048))
        },
    )


def _draw(device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda dtype, *shape: torch.randn(shape, generator=generator, device=device).to(dtype)
