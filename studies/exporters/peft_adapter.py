"""HF peft's format: adapter_config.json and adapter_model.safetensors, for `PeftModel.from_pretrained`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from typing_extensions import override

from autopeft.evaluators.gguf import EMBEDDED_LLM, EMBEDDED_LLM_ORIGIN
from autopeft.studies.exporters import peft_xlora
from autopeft.studies.exporters.averaged import AveragingExporter
from autopeft.studies.exporters.base import Assessment, ExportError, State
from autopeft.studies.exporters.loading import quantization_settings, save_processor, write_adapter_readme
from autopeft.studies.exporters.native import bare_backbone
from autopeft.studies.exporters.peft_config import plan
from autopeft.studies.exporters.peft_types import PEFT_TYPES
from autopeft.studies.exporters.peft_types.base import ADAPTER
from autopeft.studies.exporters.serving import converted, plain, plain_state, remarks_on, served, served_state
from autopeft.studies.recipes.recipe import Recipe
from autopeft.studies.recipes.tensors import tensors_at, values_of

_OTHER_WEIGHTS = (
    f"adapter_config.json names {EMBEDDED_LLM_ORIGIN} as its base model, which everybody can load. The adapter was"
    " trained on that model's weights rounded to 4 bits (Q4_1); README.md loads these, so outputs are exact there only"
)


class PeftAdapter(AveragingExporter):
    """An adapter in the format of HF peft, with LoRAs in the form that servers compute exactly (`serving.py`)."""

    name = "peft"
    summary = "adapter_config.json and adapter_model.safetensors of HF peft, with LoRAs as servers compute them"
    for_servers: ClassVar[bool] = True

    @override
    def assess(self, recipe: Recipe) -> Assessment:
        return peft_xlora.fit(recipe) or super().assess(recipe)

    @override
    def write(self, recipe: Recipe, state: State, folder: Path) -> Sequence[str] | None:
        if peft_xlora.fit(recipe) is None:
            return super().write(recipe, state, folder)
        peft_xlora.write(recipe, state, folder)
        return None

    @override
    def assess_plain(self, recipe: Recipe) -> Assessment:
        return plan(plain(recipe, self.for_servers)).fit

    @override
    def write_plain(self, recipe: Recipe, state: State, folder: Path) -> Sequence[str]:
        import torch
        from peft import get_peft_model

        trained, recipe = recipe, plain(recipe, self.for_servers)
        state = plain_state(trained, recipe, state)
        loaded = bare_backbone(recipe)
        form = served(recipe, loaded.model) if self.for_servers else recipe
        config, model = plan(form).build(), cast(Any, loaded.model)
        if loaded.new_modules:
            # Who loads the checkpoint gets other random weights for these.
            config.modules_to_save = [*(config.modules_to_save or ()), *loaded.new_modules]
        wrapped = get_peft_model(model, config, revision=recipe.backbone.revision)
        with torch.no_grad():
            fill(wrapped.base_model.model, form, served_state(recipe, form, state))
        remarks = converted(trained, recipe) + (remarks_on(recipe, form) if self.for_servers else [])
        if recipe.backbone.id == EMBEDDED_LLM:
            wrapped.peft_config[ADAPTER].base_model_name_or_path = EMBEDDED_LLM_ORIGIN
            remarks = [*remarks, _OTHER_WEIGHTS]
        write_adapter_readme(recipe, folder, remarks=remarks)  # before peft, which adds metadata to it
        wrapped.save_pretrained(folder, save_embedding_layers=False)
        save_processor(recipe, folder)
        if recipe.task_class.has_labels:
            # peft's files have neither the labels nor the padding token, from which decoders find the last token.
            if quantization_settings(recipe):
                del model.config.quantization_config  # it would say that the base model's files are quantised
            model.config.save_pretrained(folder)
        return remarks


class PeftPatterns(PeftAdapter):
    """An adapter in the format of HF peft with the ranks and alphas of the training, by module."""

    name = "peft-patterns"
    summary = "as peft, with the ranks and alphas of the training by module, to train on; servers ignore these patterns"
    for_servers = False


def fill(model: Any, recipe: Recipe, state: State) -> None:
    """Copy the trained tensors into peft's modules. Raises ExportError if peft adapts other modules than the recipe."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    expected = {recipe.sites[name].module for name, _ in recipe.adapters}
    if adapted != expected:
        raise ExportError(f"peft adapts other modules than the recipe: {', '.join(sorted(adapted ^ expected))}")
    for name, spec, values in values_of(recipe, state):
        PEFT_TYPES[spec.kind].fill(model.get_submodule(recipe.sites[name].module), values, spec)
    for site in recipe.head_sites:
        head = next(h for h in recipe.head_modules if site.module == h or site.module.startswith(f"{h}."))
        trained = model.get_submodule(head).modules_to_save[ADAPTER]
        linear = trained.get_submodule(site.module.removeprefix(head).lstrip("."))
        values = tensors_at(state, site.name, "head")
        linear.weight.copy_(values["W"])
        if "b" in values:
            linear.bias.copy_(values["b"])
