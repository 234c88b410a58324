"""Initialisation rules of parameters, each drawn from its own random stream."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from autopeft.search_space.backbones.linear import weight_of
from autopeft.search_space.parameter import Draws, Kept, Parameter


def stream(*words: object, device: torch.device | str = "cpu") -> Generator:
    """Return a random stream seeded by `words`: equal words give equal numbers in every process and every pack."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    if torch.device(device).type == "meta":  # where nothing has values
        device = "cpu"
    return Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _kaiming(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw uniformly with a = sqrt(5): bound 1/sqrt(fan_in), as in torch's Linear and the LoRA reference code."""
    bound = 1.0 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _he(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw uniformly with the bound sqrt(6/fan_in), for a gain of sqrt(2) (He et al. 2015, section 2.2)."""
    bound = math.sqrt(6.0 / shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _glorot(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw uniformly with the bound sqrt(6/(fan_in + fan_out)) of each matrix (Glorot and Bengio 2010, equation 16)."""
    bound = math.sqrt(6.0 / (shape[-2] + shape[-1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _gaussian(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw normal values with standard deviation 1/R, where R is the size of the first axis."""
    return torch.randn(shape, generator=generator) / shape[0]


def _small_normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw normal values with standard deviation 0.02, the initialisation of transformers."""
    return 0.02 * torch.randn(shape, generator=generator)


def _orthogonal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw orthonormal rows, or orthonormal columns if there are more rows than columns."""
    return nn.init.orthogonal_(torch.empty(shape), generator=generator)


def _houlsby(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw normal values with standard deviation 0.01, truncated at 0.02 (Houlsby et al. 2019, section 3.6)."""
    return nn.init.trunc_normal_(torch.empty(shape), std=0.01, a=-0.02, b=0.02, generator=generator)


def _unit_uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw uniformly with standard deviation 1."""
    bound = math.sqrt(3.0)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _vector_bank(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw uniformly with the bound 0.02, as peft's VBLoRAConfig."""
    return torch.empty(shape).uniform_(-0.02, 0.02, generator=generator)


def _vector_logits(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw normal values with standard deviation 0.1, as peft's VBLoRAConfig."""
    return 0.1 * torch.randn(shape, generator=generator)


def _tiny_normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw normal values with standard deviation 0.001, truncated at 0.002, for weights that are scaled later."""
    return nn.init.trunc_normal_(torch.empty(shape), std=0.001, a=-0.002, b=0.002, generator=generator)


def _pairs(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw half of the columns as `_kaiming`, and each of them twice."""
    return _kaiming((*shape[:-1], shape[-1] // 2), generator).repeat_interleave(2, -1)


RULES: dict[str, Callable[[tuple[int, ...], Generator], Tensor]] = {
    "zeros": lambda shape, generator: torch.zeros(shape),
    "ones": lambda shape, generator: torch.ones(shape),
    "kaiming": _kaiming,
    "he": _he,
    "glorot": _glorot,
    "gaussian": _gaussian,
    "small_normal": _small_normal,
    "normal": lambda shape, generator: torch.randn(shape, generator=generator),
    "houlsby": _houlsby,
    "tiny_normal": _tiny_normal,
    "orthogonal": _orthogonal,
    "pairs": _pairs,
    "unit_uniform": _unit_uniform,
    "vector_bank": _vector_bank,
    "vector_logits": _vector_logits,
}


def initialise(parameter: Parameter, generator: Generator, base: nn.Module | None) -> Tensor:
    """Return a new tensor of `parameter.shape`, float32 or int32.

    "row_norm" and "column_norm" are the norms of the rows and columns of the weight of `base`, "places" are random
    indices of its elements.
    """
    if isinstance(parameter.init, float):
        return torch.full(parameter.shape, parameter.init)
    if isinstance(parameter.init, Draws):
        rounds = -(-parameter.count // parameter.init.below)
        drawn = [torch.randperm(parameter.init.below, generator=generator) for _ in range(rounds)]
        return torch.cat(drawn)[: parameter.count].int().view(parameter.shape)
    assert isinstance(parameter.init, str), "`factors.Starts` has the values of factors"
    if parameter.init in RULES:
        return RULES[parameter.init](parameter.shape, generator)
    assert base is not None, parameter.init
    weight = weight_of(base)
    if parameter.init == "places":
        return _places(parameter.count, weight, generator)
    norms: Tensor = weight.float().norm(dim={"row_norm": 1, "column_norm": 0}[parameter.init])
    return norms


def kept(values: Tensor, scores: Tensor, declared: Parameter) -> Tensor:
    """Return the values of the highest scores, or their places for a parameter of indices: [count].

    values: [R, D] or [D, R], scores: the same; places are those of [R, D].
    """
    assert isinstance(declared.init, Kept)
    values, scores = (tensor.movedim(declared.init.units, 0).flatten() for tensor in (values, scores))
    order = scores.sort(descending=True, stable=True).indices[: declared.count]
    return order.int() if declared.indices else values[order]


def _places(count: int, of: Tensor, generator: Generator) -> Tensor:
    """Return flat indices [count] of different elements of a tensor, in random order."""
    if 4 * count > of.numel():
        return torch.randperm(of.numel(), generator=generator)[:count].int()
    # For a few places of a large weight, a permutation of all its elements would be wasteful.
    found: dict[int, None] = {}
    while len(found) < count:
        found.update(dict.fromkeys(torch.randint(of.numel(), (count,), generator=generator).tolist()))
    return torch.tensor(list(found)[:count], dtype=torch.int32)
