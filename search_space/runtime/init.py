"""Rules that fill a new parameter, each from its own random stream."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from autopeft.search_space.adapters.base import Parameter
from autopeft.search_space.backbones.linear import weight_of


def _kaiming(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform with a = sqrt(5): bound 1/sqrt(fan_in), as torch's Linear and the LoRA reference code do."""
    bound = 1.0 / math.sqrt(shape[-1])
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
    "gaussian": _gaussian,
    "small_normal": _small_normal,
    "normal": lambda shape, generator: torch.randn(shape, generator=generator),
    "houlsby": _houlsby,
    "orthogonal": _orthogonal,
}


def initialise(parameter: Parameter, generator: Generator, base: nn.Module) -> Tensor:
    """A new float32 tensor of `parameter.shape`; "row_norm" measures the weight of `base`."""
    if parameter.init == "row_norm":
        return weight_of(base).float().norm(dim=1)
    return RULES[parameter.init](parameter.shape, generator)
