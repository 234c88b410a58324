"""Axolotl's configuration: causal language models with LoRA, rsLoRA or DoRA, ranks and alphas by module.

Axolotl has `lora_rank_pattern` and `lora_alpha_pattern` since July 2026 (its pull request 3673).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from typing_extensions import override

from autopeft.search_space.adapters.lora import Lora
from autopeft.studies.exporters.base import Assessment, Exporter, State, approximate, unsupported
from autopeft.studies.exporters.loading import quantization_settings, write_training_readme
from autopeft.studies.exporters.peft_config import decayed_vectors, plan
from autopeft.studies.exporters.peft_types.base import anchored
from autopeft.studies.exporters.rows import write_token_rows
from autopeft.studies.recipes.recipe import Recipe

CONFIG_FILE = "axolotl.yaml"
_HEADER = """\
Written by autopeft from recipe.yaml beside it. In this folder: axolotl train axolotl.yaml
The rows are those of the study as token ids of the model's tokenizer; the label -100 marks tokens without a loss.
Random numbers and the order of the rows differ from the study. Axolotl averages the loss over all tokens, the study
over the tokens of each row and then over rows.
"""
# GPT-2 has dropout inside its backbone; the study keeps the frozen backbone in evaluation mode.
_DROPOUTS = {"gpt2": ("attn_pdrop", "embd_pdrop", "resid_pdrop")}


class Axolotl(Exporter):
    """A configuration for `axolotl train`; it has no trained weights."""

    name = "axolotl"
    summary = "axolotl.yaml (causal language models; LoRA, rsLoRA, DoRA)"
    needs_state = False

    @override
    def assess(self, recipe: Recipe) -> Assessment:
        if recipe.task_class.trainer != "SFTTrainer":
            return unsupported(f"task {recipe.task}: axolotl trains causal language models here")
        peft = plan(recipe)
        if peft.fit.level == "unsupported":
            return peft.fit
        if peft.config != "LoraConfig":
            return unsupported(*(f"{name} {spec.kind}: axolotl supports LoRA alone" for name, spec in recipe.adapters))
        default, pattern = peft.arguments["lora_alpha"], peft.arguments["alpha_pattern"]
        alphas = {name: pattern.get(anchored(recipe.sites[name].module), default) for name, _ in recipe.adapters}
        fractions = [
            f"{name}: alpha {alpha} is not an integer, which axolotl requires"
            for name, alpha in alphas.items()
            if not isinstance(alpha, int)
        ]
        if fractions:
            return unsupported(*fractions)
        return approximate(*peft.fit.lost, *_lost_rates(recipe))

    @override
    def write(self, recipe: Recipe, state: State, folder: Path) -> Sequence[str]:
        data = CommentedMap(settings(recipe))
        data.yaml_set_start_comment(_HEADER)
        yaml = YAML()
        yaml.width = 1000
        with (folder / CONFIG_FILE).open("w", encoding="utf-8") as file:
            yaml.dump(data, file)
        write_token_rows(recipe, folder)
        return write_training_readme(recipe, folder, f"axolotl train {CONFIG_FILE}")


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return axolotl's settings for a recipe that `Axolotl.assess` accepts."""
    from autopeft.evaluators.backbones import resolve

    peft, training = plan(recipe).arguments, recipe.training
    factor, ratio = _common_rates(recipe)
    found: dict[str, Any] = {
        "base_model": resolve(recipe.backbone.id),
        "revision_of_model": recipe.backbone.revision,
        **_quantization(recipe),
        "lora_r": peft["r"],
        "lora_alpha": peft["lora_alpha"],
        "lora_dropout": peft["lora_dropout"],
        "lora_target_modules": peft["target_modules"],
        "lora_rank_pattern": peft["rank_pattern"],
        "lora_alpha_pattern": peft["alpha_pattern"],
        "lora_fan_in_fan_out": peft.get("fan_in_fan_out"),
        "peft_use_dora": peft["use_dora"],
        "peft_use_rslora": peft["use_rslora"],
        "peft_init_lora_weights": peft["init_lora_weights"],
        "datasets": [_rows("train")],
        "test_datasets": [_rows("validation")],
        "sequence_len": recipe.data.max_length,
        "sample_packing": False,
        "eval_sample_packing": False,
        "learning_rate": training.learning_rate * factor,
        "loraplus_lr_ratio": None if ratio == 1.0 else ratio,
        "weight_decay": training.weight_decay,
        "num_epochs": training.epochs,
        "micro_batch_size": training.batch_size,
        "gradient_accumulation_steps": 1,
        "warmup_ratio": training.warmup,
        "lr_scheduler": "constant_with_warmup" if training.schedule == "constant" else training.schedule,
        "max_grad_norm": training.max_grad_norm,
        "optimizer": "adamw_torch",
        "seed": recipe.seed,
        "bf16": recipe.backbone.dtype == "bfloat16",
        "fp16": recipe.backbone.dtype == "float16",
        "tf32": False,
        "overrides_of_model_config": dict.fromkeys(_DROPOUTS.get(recipe.backbone.family, ()), 0.0),
        "output_dir": "./output",
    }
    # Axolotl treats absent and empty settings alike.
    return {name: value for name, value in found.items() if value not in (None, {})}


def _common_rates(recipe: Recipe) -> tuple[float, float]:
    """Return the `rate` and `rate_ratio` of the first LoRA, which axolotl has once for all."""
    first = next(spec for _, spec in recipe.adapters if isinstance(spec, Lora))
    return first.rate, first.rate_ratio


def _lost_rates(recipe: Recipe) -> list[str]:
    factor, ratio = _common_rates(recipe)
    loras = [(name, spec) for name, spec in recipe.adapters if isinstance(spec, Lora)]
    lost = [
        f"{name} {spec.kind}: {field} {own} becomes {value}, one for all sites (affects only training)"
        for name, spec in loras
        for field, own, value in (("rate", spec.rate, factor), ("rate_ratio", spec.rate_ratio, ratio))
        if own != value
    ]
    lost += [f"{name} {spec.kind}: freeze_a: axolotl trains A too" for name, spec in loras if spec.freeze_a]
    if ratio == 1.0:
        lost += decayed_vectors(recipe)
    elif recipe.training.weight_decay:
        lost.append(f"weight_decay {recipe.training.weight_decay}: axolotl's LoRA+ has none (affects only training)")
    return lost


def _quantization(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of QLoRA for a backbone in 4 bits, of LoRA on 8 bits, or of LoRA."""
    scheme = recipe.backbone.quantization
    if scheme is None or scheme == "int8":
        return {"adapter": "lora", "load_in_8bit": scheme and True}
    # Axolotl's own defaults quantise the scales of the weights too.
    types = {"bnb_4bit_quant_type": scheme, "bnb_4bit_compute_dtype": recipe.backbone.dtype}
    of_bitsandbytes = {**types, "bnb_4bit_use_double_quant": False, **quantization_settings(recipe)}
    of_bitsandbytes.pop("load_in_4bit", None)
    return {"adapter": "qlora", "load_in_4bit": True, "bnb_config_kwargs": of_bitsandbytes}


def _rows(split: str) -> dict[str, Any]:
    """Return the entry of rows of token ids, which have no type."""
    return {"path": f"{split}.jsonl", "ds_type": "json", "split": "train", "type": None}
