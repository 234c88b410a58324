"""Whether the inputs of a model's sites can be cut into the parts of the slots of a pack.

`Attachment` takes the input of a site to be the examples of the slots one after the other. Some modules get another
input: XLNet's layers have the tokens first, and DeBERTa's projections also read the relative positions, once for all
examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.evaluators.errors import ModelError
from autopeft.search_space.backbones.backbone import Backbone

#: Share of the vectors of an input that must be equal. A router of the model may send a few tokens to other experts,
#: because a larger batch is rounded differently.
EQUAL = 0.5


def close(found: Tensor, expected: Tensor) -> Tensor:
    """Return for each vector [..., D] whether it differs by no more than rounding: [...]."""
    tolerance = torch.finfo(found.dtype).eps ** 0.5
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return torch.isclose(found, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True).all(-1)


def by_slot(tensor: Tensor, num_slots: int) -> Tensor:
    """Reshape [K * N, ..., D] to [K, M, D]. Raises ValueError for a tensor that is not made of K parts."""
    if tensor.dim() > 2 and len(tensor) % num_slots:
        raise ValueError(
            f"a module with adapters reads a tensor of shape {list(tensor.shape)}, which is not made of the examples of"
            f" {num_slots} candidates: they must be trained alone (evaluation.evaluator: train)"
        )
    return tensor.reshape(num_slots, -1, tensor.shape[-1])


def repeated(tensor: Tensor, slots: int) -> Tensor:
    """Repeat [N, ...] to [K * N, ...], with the examples of a slot next to each other."""
    return tensor.repeat(slots, *[1] * (tensor.dim() - 1))


def tapped_input(inputs: list[Tensor], output: Tensor) -> Tensor:
    """Return the latest input of a sub-layer with a vector for each vector of its output.

    The first linear of a sub-layer may run several times, on other tensors too. Raises ValueError if no input fits.
    """
    for x in reversed(inputs):
        if x.shape[:-1] == output.shape[:-1] or (
            min(x.dim(), output.dim()) == 2 and x.shape[:-1].numel() == output.shape[:-1].numel()
        ):
            return x
    raise ValueError(
        f"the input of a sub-layer has the shape {list(inputs[-1].shape)}, which does not fit its output"
        f" {list(output.shape)}: adapters that read the input cannot be attached there"
    )


@torch.no_grad()
def unpackable_sites(model: nn.Module, backbone: Backbone, inputs: Mapping[str, Tensor]) -> frozenset[str]:
    """Return the names of the sites whose adapters cannot share a pack.

    The test runs the model on a small batch, `inputs`, and on the batch with its examples in reverse order behind it.
    At each site, the first half of the second pass must be the first pass. Raises ModelError for a site whose output is
    not a tensor, so that no adapter can change it.
    """
    sites = [site for site in backbone.sites if site.role not in ("embed", "backbone")]
    paths = {path for site in sites for path in (site.module, site.input_module)}
    try:
        with _inputs_of(model, paths) as alone:
            model(**inputs)
    except ModelError:
        raise
    except Exception:  # a study stops with this error, because all its candidates have it
        return frozenset()
    try:
        with _inputs_of(model, paths) as packed:
            model(**{name: torch.cat([tensor, tensor.flip(0)]) for name, tensor in inputs.items()})
    except Exception:  # alone it works
        return frozenset(site.name for site in sites)
    good = {path for path in paths if _cut_well(packed[path], alone[path])}
    return frozenset(site.name for site in sites if not {site.module, site.input_module} <= good)


def _cut_well(packed: list[Tensor], alone: list[Tensor]) -> bool:
    """Return whether the first slots of the inputs in a pack of two are the inputs alone."""
    if len(packed) != len(alone):
        return False
    for two, one in zip(packed, alone, strict=True):
        expected = by_slot(one, 1)[0]
        if two.numel() != 2 * one.numel() or (two.dim() > 2 and len(two) % 2):
            return False
        if close(by_slot(two, 2)[0], expected).float().mean() < EQUAL:
            return False
    return True


@contextmanager
def _inputs_of(model: nn.Module, paths: set[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Yield the inputs of the modules at `paths` in the order of their calls, which hooks fill in."""
    inputs: dict[str, list[Tensor]] = {path: [] for path in paths}

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            if not isinstance(output, Tensor):
                kind = f"{type(module).__name__} returns a {type(output).__name__}"
                raise ModelError(f"this model cannot take adapters: at {path}, {kind} instead of a tensor")
            inputs[path].append(next(each for each in (*args, *named.values()) if isinstance(each, Tensor)))

        return hook

    handles = [model.get_submodule(path).register_forward_hook(record(path), with_kwargs=True) for path in paths]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
