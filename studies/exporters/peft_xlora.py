"""peft's X-LoRA: pretrained LoRAs and the classifier that weights them.

The folder has a subfolder for each LoRA, `0`, `1` and so on, and the classifier. peft 0.21 takes the paths of the LoRAs
from the configuration or, if that has none, as here, from the caller; and it needs a model without a cache:

    model = AutoModelForCausalLM.from_pretrained(..., use_cache=False)
    PeftModel.from_pretrained(model, folder, adapters={"0": f"{folder}/0", "1": f"{folder}/1"})

It finds the modules of a LoRA only in models that have their layers in `model`, as Llama, Qwen, Mistral and Gemma do,
and it saves no task head.
"""

from __future__ import annotations

import json
from pathlib import Path

from autopeft.search_space.adapters.given import CONFIG, WEIGHTS
from autopeft.search_space.adapters.mixture import Mixture
from autopeft.search_space.routers import XLora
from autopeft.studies.exporters.base import Assessment, State, approximate
from autopeft.studies.exporters.loading import save_processor, write_adapter_readme
from autopeft.studies.exporters.native import bare_backbone
from autopeft.studies.exporters.peft_config import PeftPlan, plan
from autopeft.studies.recipes.recipe import Recipe


def fit(recipe: Recipe) -> Assessment | None:
    """Return how well X-LoRA can hold a recipe; None if it cannot."""
    mixtures = [spec for _, spec in recipe.adapters if isinstance(spec, Mixture) and isinstance(spec.routed_by, XLora)]
    if not mixtures or len(mixtures) != sum(1 for _ in recipe.adapters):
        return None
    if len({spec.given for spec in mixtures}) > 1 or recipe.head_modules:
        return None
    paths = [recipe.sites[name].module for name in recipe.architecture]
    if not all(path.startswith("model.") and not path.startswith("model.model.") for path in paths):
        return None
    experts = _experts(recipe).fit
    if experts.level == "unsupported":
        return None
    dtype = recipe.backbone.dtype
    rounded = () if dtype == "float32" else (f"backbone dtype {dtype}: peft's classifier computes in that dtype",)
    return approximate(*experts.lost, *rounded)


def write(recipe: Recipe, state: State, folder: Path) -> None:
    """Write the folder of a recipe for which `fit` is not None."""
    import torch
    from peft import XLoraConfig
    from safetensors.torch import save_file

    origin, model = recipe.backbone, bare_backbone(recipe).model
    found = {recipe.sites[name].module: f"{name}/{Mixture.kind}/" for name in recipe.architecture}
    # In the order in which peft numbers the modules.
    own = {path: found[path] for path, _ in model.named_modules() if path in found}

    config = _experts(recipe).build()
    config.base_model_name_or_path, config.inference_mode = origin.id, True
    count = max(spec.num_experts for _, spec in recipe.adapters)
    for e in range(count):
        config.save_pretrained(str(folder / str(e)))
        tensors = {
            f"base_model.model.{path}.lora_{name}.weight": state[f"{prefix}{name}"][e].contiguous()
            for path, prefix in own.items()
            for name in "AB"
        }
        save_file(tensors, folder / str(e) / WEIGHTS, metadata={"format": "pt"})

    whole = XLoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=origin.id,
        revision=origin.revision,
        inference_mode=True,
        hidden_size=origin.hidden_size,
        adapters={},
        layerwise_scalings=True,
    ).to_dict()
    del whole["adapters"]  # peft would prefer these paths to those of the caller
    (folder / CONFIG).write_text(json.dumps(whole, indent=2, sort_keys=True), encoding="utf-8")
    # peft's own `save_pretrained` omits them: it mistakes "layers.0" for a part of the LoRA "0".
    layer = "base_model.internal_xlora_classifier.layers.0"
    classifier = {
        f"{layer}.weight": torch.cat([state[f"{prefix}router"] for prefix in own.values()]),
        f"{layer}.bias": torch.cat([state[f"{prefix}router_bias"] for prefix in own.values()]),
    }
    save_file(classifier, folder / WEIGHTS, metadata={"format": "pt"})

    save_processor(recipe, folder)
    paths = ", ".join(f'"{e}": f"{{FOLDER}}/{e}"' for e in range(count))
    write_adapter_readme(recipe, folder, model_options=["use_cache=False"], adapter_options=[f"adapters={{{paths}}}"])


def _experts(recipe: Recipe) -> PeftPlan:
    """Return the configuration that all the LoRAs have in common."""
    placed = {name: tuple(spec.plain for spec in specs) for name, specs in recipe.architecture.items()}
    return plan(recipe.model_copy(update={"architecture": placed}))
