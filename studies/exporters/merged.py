"""A plain transformers model with the adapters merged into its weights, which any runtime loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from autopeft.search_space.adapters import AdapterSpec
from autopeft.search_space.backbones.backbone import Site
from autopeft.studies.exporters.averaged import AveragingExporter
from autopeft.studies.exporters.base import Assessment, ExportError, State, approximate, unsupported
from autopeft.studies.exporters.loading import save_processor, write_model_readme
from autopeft.studies.exporters.native import attach
from autopeft.studies.recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

#: By dtype of the weights: the relative difference of logits that rounding can cause.
_ROUNDING = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}


class Merged(AveragingExporter):
    """A transformers model without adapters, whose weights include them."""

    name = "merged"
    summary = "a plain transformers model with the adapters merged into its weights, and the tokenizer"

    @override
    def assess_plain(self, recipe: Recipe) -> Assessment:
        reasons = []
        for name, spec in recipe.adapters:
            site = recipe.sites[name]
            if site.role == "backbone":
                continue  # full fine-tuning: there is nothing to merge
            if not spec.mergeable:
                reasons.append(f"{name} {spec.kind}: cannot be merged into the weights")
            elif _adds_bias(spec, site):
                reasons.append(f"{name} {spec.kind}: needs a bias, but this layer of {recipe.backbone.family} has none")
        if reasons:
            return unsupported(*reasons)
        if recipe.backbone.dtype != "float32" and recipe.adapters:
            return approximate(f"backbone dtype {recipe.backbone.dtype}: the merged weights are rounded to it")
        return approximate()

    @override
    def write_plain(self, recipe: Recipe, state: State, folder: Path) -> Sequence[str]:
        model, attachment = attach(recipe, state, in_full=True)
        with attachment:
            adapted = _logits(model)
            with attachment.merged():
                _check_equal(adapted, _logits(model), recipe)
                model.save_pretrained(folder)
        save_processor(recipe, folder)
        write_model_readme(recipe, folder)
        quantization, dtype = recipe.backbone.quantization, recipe.backbone.dtype
        if quantization is None:
            return ()
        return (
            f"the weights are the dequantised ones of {quantization} with the adapters merged, in {dtype}: the logits"
            f" are those of the adapters on {quantization} up to the rounding of {dtype}, and the files are larger;"
            " quantising them again would round the adapters too",
        )


def _logits(model: PreTrainedModel) -> Tensor:
    import torch

    with torch.no_grad():
        logits: Tensor = model(**model.dummy_inputs).logits.float()
    return logits


def _check_equal(adapted: Tensor, merged: Tensor, recipe: Recipe) -> None:
    """Raise ExportError if merging changed the outputs by more than rounding, as tied weights may cause."""
    largest = (adapted - merged).abs().max().item()
    allowed = _ROUNDING[recipe.backbone.dtype] * (1.0 + adapted.abs().max().item())
    if not largest <= allowed:
        raise ExportError(f"the merged model differs from the adapted one: their logits differ by {largest:.2g}")


def _adds_bias(spec: AdapterSpec, site: Site) -> bool:
    """Return whether merging adds a bias that the model lacks; a plain model would not load it."""
    # Sites that differ only in their place are one for the cache.
    anywhere = replace(site, name="", layer=None, module="", input_module="", attention_module=None)
    return not site.bias and _merges_into_bias(spec, anywhere)


@lru_cache(maxsize=1024)
def _merges_into_bias(spec: AdapterSpec, site: Site) -> bool:
    """Return whether merging makes a bias, tried without values."""
    import torch

    values = {
        name: torch.empty(parameter.shape, device="meta", dtype=torch.int32 if parameter.indices else torch.float32)
        for name, parameter in spec.parameters(site).items()
    }
    shape = (site.out_features,) if site.role == "norm" else (site.out_features, site.in_features)
    return spec.merge(values, torch.empty(shape, device="meta"), None)[1] is not None
