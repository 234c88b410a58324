"""autopeft's own format, the recipe and the trained tensors: it can hold every candidate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from autopeft.studies.exporters.base import EXACT, RECIPE_FILE, Assessment, Exporter, ExportError, State
from autopeft.studies.recipes.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from autopeft.evaluators.attachment.attachment import Attachment
    from autopeft.evaluators.backbones import LoadedBackbone

WEIGHTS_FILE = "adapter.safetensors"


class Native(Exporter):
    """The recipe and the trained tensors."""

    name = "native"
    summary = "recipe.yaml and adapter.safetensors; loads with autopeft.studies.exporters.native.load"

    @override
    def assess(self, recipe: Recipe) -> Assessment:
        return EXACT

    @override
    def write(self, recipe: Recipe, state: State, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file(dict(state), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def bare_backbone(recipe: Recipe) -> LoadedBackbone:
    """Return the recipe's transformers model without adapters, in evaluation mode.

    Its configuration has the settings of the task's variant, such as the problem type. Raises ModelError, also for a
    model that has changed since the study.
    """
    from autopeft.evaluators.backbones import load_backbone
    from autopeft.evaluators.errors import ModelError

    origin = recipe.backbone
    loaded = load_backbone(
        origin.id,
        task=recipe.task,
        labels=recipe.labels,
        revision=origin.revision,
        dtype=origin.dtype,
        backbone=recipe.host,  # its sites may have been named by hand
        quantization=origin.quantization,
    )
    if recipe.contents is not None and loaded.weights() != recipe.contents.weights:
        raise ModelError(
            f"{origin.id}: the model differs from the one that the study trained, so the weights do not fit it: restore"
            " it, or export to native, which needs no model"
        )
    config: Any = loaded.model.config
    for name, value in recipe.task_class.model_settings(recipe.labels).items():
        setattr(config, name, value)
    return loaded


def attach(recipe: Recipe, state: State, *, in_full: bool = False) -> tuple[PreTrainedModel, Attachment]:
    """Return the backbone with the trained adapters and head attached, in evaluation mode.

    `in_full`: a quantised backbone gets its dequantised weights, into which adapters can be merged. Raises ModelError
    for a backbone that cannot be loaded, KeyError or ValueError for weights of another recipe.
    """
    from autopeft.evaluators.attachment.attachment import Attachment
    from autopeft.evaluators.quantization import dequantize

    model: Any = bare_backbone(recipe).model
    host = recipe.host
    if in_full and host.quantization is not None:
        dequantize(model)
        host = replace(host, quantization=None)
    attachment = Attachment(model, host, [recipe.adapters], [recipe.seed], pretrained_head=True, draw=False)
    attachment.load_state(dict(state))
    return model, attachment.eval()


def load(folder: str | Path) -> tuple[PreTrainedModel, Attachment]:
    """Load the model and the attachment that adapts it; `attachment.detach()` restores the bare model.

    A router that depends on the task needs the domains [texts] of the texts before every call:
    `attachment.routers.tokens.domains = torch.tensor([N])` for a single text. N is the index of its domain in the
    recipe's `domains`.

    Raises RecipeError, ExportError for missing or damaged weights, and ModelError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    recipe = Recipe.load(folder / RECIPE_FILE)
    try:
        return attach(recipe, load_file(folder / WEIGHTS_FILE))
    except (FileNotFoundError, SafetensorError) as error:
        raise ExportError(f"{folder / WEIGHTS_FILE}: cannot be read: {error}") from None
    except KeyError as error:
        raise ExportError(f"{folder / WEIGHTS_FILE}: has no tensor {error}") from None
