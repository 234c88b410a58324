"""Rules that fill a new parameter, each from its own random stream."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from autopeft.search_space.backbones.linear import weight_of
from autopeft.search_space.parameter import Parameter


def stream(*words: object, device: torch.device | str = "cpu") -> Generator:
    """A random stream named by `words`: the same words give the same numbers, in any process and any pack."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _kaiming(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform with a = sqrt(5): bound 1/sqrt(fan_in), as torch's Linear and the LoRA reference code do."""
    bound = 1.0 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _he(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform with the bound sqrt(6/fan_in), for a gain of sqrt(2) (He et al. 2015, section 2.2)."""
    bound = math.sqrt(6.0 / shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _gaussian(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Normal with standard deviation 1/R, R being the first axis."""
    return torch.randn(shape, generator=generator) / shape[0]


def _small_normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Normal with standard deviation 0.02, the transformers' own initialisation."""
    return 0.02 * torch.randn(shape, generator=generator)


def _orthogonal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Orthonormal rows (columns, if there are more rows than columns)."""
    return nn.init.orthogonal_(torch.empty(shape), generator=generator)


def _houlsby(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Normal with standard deviation 0.01, cut at two of them (Houlsby et al. 2019, section 3.6)."""
    return nn.init.trunc_normal_(torch.empty(shape), std=0.01, a=-0.02, b=0.02, generator=generator)


RULES: dict[str, Callable[[tuple[int, ...], Generator], Tensor]] = {
    "zeros": lambda shape, generator: torch.zeros(shape),
    "ones": lambda shape, generator: torch.ones(shape),
    "kaiming": _kaiming,
    "he": _he,
    "gaussian": _gaussian,
    "small_normal": _small_normal,
    "normal": lambda shape, generator: torch.randn(shape, generator=generator),
    "houlsby": _houlsby,
    "orthogonal": _orthogonal,
}


def initialise(parameter: Parameter, generator: Generator, base: nn.Module | None) -> Tensor:
    """A new tensor of `parameter.shape`, float32 or int32. "row_norm" measures the weight of `base`, "places" chooses
    among its elements.
    """
    if isinstance(parameter.init, float):
        return torch.full(parameter.shape, parameter.init)
    if parameter.init in RULES:
        return RULES[parameter.init](parameter.shape, generator)
    assert base is not None, parameter.init
    weight = weight_of(base)
    return weight.float().norm(dim=1) if parameter.init == "row_norm" else _places(parameter.count, weight, generator)


def _places(count: int, of: Tensor, generator: Generator) -> Tensor:
    """[count] different places of the elements of a tensor, in random order."""
    if 4 * count > of.numel():
        return torch.randperm(of.numel(), generator=generator)[:count].int()
    # Not all of a large weight in random order for a few places of it.
    found: dict[int, None] = {}
    while len(found) < count:
        found.update(dict.fromkeys(torch.randint(of.numel(), (count,), generator=generator).tolist()))
    return torch.tensor(list(found)[:count], dtype=torch.int32)
