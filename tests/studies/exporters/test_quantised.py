"""Exports of recipes over quantised backbones: what other tools load is the network that was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from ruamel.yaml import YAML
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from autopeft.search_space.adapters import (
    Beft,
    Boft,
    C3a,
    Delora,
    Dora,
    Gralora,
    Hira,
    Hra,
    Ia3,
    Loha,
    Lokr,
    Lora,
    Miss,
    Norm,
    Oft,
    Road,
    Shira,
    Vera,
)
from autopeft.search_space.backbones.quantized import is_quantized
from autopeft.studies.exporters import EXPORTERS, native
from autopeft.studies.exporters.trl_script import script
from autopeft.studies.recipes.recipe import Recipe

from ...support.exported import CLASSIFIERS, WORDS, logits, make_recipe, save_model, trained
from ...support.slow import slow
from ...support.tiny_gguf import write_gguf

pytest.importorskip("bitsandbytes")
torch.set_num_threads(1)

#: Models of widths that bitsandbytes itself dequantises rightly on a CPU: multiples of 64.
_WIDE = {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 128}
_IDS = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_GPT2 = {"n_embd": 64, "n_layer": 12, "n_head": 2, "n_positions": 64}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_WIDE, **_IDS, num_key_value_heads=1)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2, **_IDS)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**_WIDE, **_IDS, num_labels=3)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**_WIDE, **_IDS, num_labels=3)),
}
SITES = {"gpt2": ("attn.qkv", "mlp.down")}


def recipe_over(folder: Path, family: str, quantization: str | None, make: Any = Lora, **fields: Any) -> Recipe:
    model = folder / "model"
    if not model.exists():
        save_model(family, model, MODELS[family])
    sites = [f"layers.{i}.{role}" for i in (1, 11) for role in SITES.get(family, ("attn.q", "attn.v"))]
    return make_recipe(family, model, {name: make(**fields) for name in sites}, quantization=quantization)


def as_the_study_computes(model: nn.Module) -> nn.Module:
    """Turn off what bitsandbytes rounds besides the weights: to bfloat16 on some CPUs, and the inputs of int8."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if type(module).__name__ == "Linear8bitLt":
            module.train()
    return model


def run_readme(folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The model of the code in an export's README.md."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    with monkeypatch.context() as here:
        here.chdir(folder)
        exec(code, found)
    model: nn.Module = found["model"]
    return as_the_study_computes(model)


PEFT_CASES = [
    ("llama", "nf4", Lora, {"rank": 3}),
    slow("llama", "nf4", Dora, {"rank": 3}),
    slow("llama", "nf4", Vera, {"rank": 4}),
    ("llama", "nf4", Gralora, {"rank": 2}),
    slow("llama", "nf4", Miss, {"rank": 4}),
    slow("llama", "nf4", C3a, {"block_size": 8}),
    slow("llama", "nf4", Road, {"group_size": 8}),
    slow("llama", "nf4", Oft, {"block_size": 8}),
    slow("llama", "nf4", Boft, {"block_size": 4}),
    slow("llama", "nf4", Beft, {}),
    ("gpt2", "nf4", Lora, {"rank": 3}),
    slow("gpt2", "nf4", Dora, {"rank": 3}),
    slow("bert", "nf4", Lora, {"rank": 3}),
    slow("llama", "int8", Lora, {"rank": 3}),
    ("llama", "int8", Dora, {"rank": 3}),
]


@pytest.mark.parametrize(("family", "quantization", "make", "fields"), PEFT_CASES)
def test_peft_computes_the_same_logits_on_the_same_quantised_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, quantization: str, make: Any, fields: dict[str, Any]
) -> None:
    recipe = recipe_over(tmp_path, family, quantization, make, **fields)
    state, wanted = trained(recipe)
    fit = EXPORTERS["peft"].export(recipe, state, tmp_path / "out", allow_lossy=True)
    assert fit.level == ("exact" if quantization == "nf4" else "approximate"), fit
    model = run_readme(tmp_path / "out", monkeypatch)
    assert isinstance(model, PeftModel)
    assert sum(is_quantized(module) for module in model.modules()) >= 12
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_the_readme_of_peft_quantises_the_dequantised_copy_of_a_gguf_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers does not quantise what it reads from a GGUF file."""
    pytest.importorskip("gguf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    write_gguf(tmp_path / "tiny.gguf")
    placement = {"layers.1.attn.q": Lora(rank=2)}
    recipe = make_recipe("llama", tmp_path / "tiny.gguf", placement, quantization="nf4")
    EXPORTERS["peft"].export(recipe, trained(recipe)[0], tmp_path / "out", allow_lossy=True)
    model = run_readme(tmp_path / "out", monkeypatch)
    assert isinstance(model, PeftModel)
    assert sum(is_quantized(module) for module in model.modules()) >= 14


@pytest.mark.parametrize("make", [Ia3, slow(Norm), slow(Shira)])
def test_other_types_of_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    save_model("llama", tmp_path / "model", MODELS["llama"])
    sites = {Ia3: "attn.v", Norm: "norm.0", Shira: "attn.q"}
    placement = {f"layers.{i}.{sites[make]}": make() for i in (1, 11)}
    recipe = make_recipe("llama", tmp_path / "model", placement, quantization="nf4")
    if make is Shira:
        assert EXPORTERS["peft"].assess(recipe).level == "unsupported"
        return
    state, wanted = trained(recipe)
    EXPORTERS["peft"].export(recipe, state, tmp_path / "out", allow_lossy=True)
    torch.testing.assert_close(logits(run_readme(tmp_path / "out", monkeypatch)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [Hira, Loha, slow(Lokr), slow(Delora), slow(Hra)])
def test_what_peft_computes_with_the_weight_is_refused(tmp_path: Path, make: Any) -> None:
    recipe = recipe_over(tmp_path, "llama", "nf4", make)
    fit = EXPORTERS["peft"].assess(recipe)
    assert fit.level == "unsupported"
    assert all(line.endswith("peft computes with the weight itself, which is quantised") for line in fit.lost)
    EXPORTERS["native"].export(recipe, trained(recipe)[0], tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "quantization"), [("llama", "nf4"), ("gpt2", "nf4"), slow("roberta", "nf4"), slow("llama", "int8")]
)
def test_merged_has_the_dequantised_weights_and_says_so(tmp_path: Path, family: str, quantization: str) -> None:
    recipe = recipe_over(tmp_path, family, quantization, Dora, rank=3)
    state, wanted = trained(recipe)
    fit = EXPORTERS["merged"].export(recipe, state, tmp_path / "out")
    assert fit.level == "exact"
    (remark,) = fit.remarks
    assert f"dequantised ones of {quantization}" in remark
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    kind = AutoModelForSequenceClassification if family in CLASSIFIERS else AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path / "out").eval()
    assert not any(map(is_quantized, model.modules()))
    if isinstance(model, GPT2LMHeadModel):
        assert isinstance(model.get_submodule("transformer.h.1.attn.c_attn"), Conv1D)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_native_loads_the_quantised_backbone(tmp_path: Path, quantization: str) -> None:
    recipe = recipe_over(tmp_path, "llama", quantization)
    state, wanted = trained(recipe)
    EXPORTERS["native"].export(recipe, state, tmp_path / "out")
    assert Recipe.load(tmp_path / "out" / "recipe.yaml").backbone.quantization == quantization
    model, attachment = native.load(tmp_path / "out")
    assert any(map(is_quantized, model.modules()))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-6, atol=1e-6)
    attachment.detach()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_script_quantises_as_the_study(tmp_path: Path, family: str) -> None:
    text = script(recipe_over(tmp_path, family, "nf4"))
    compile(text, "train.py", "exec")
    line = next(line for line in text.splitlines() if line.startswith("QUANTIZATION = "))
    config = eval(line.removeprefix("QUANTIZATION = "), {"BitsAndBytesConfig": BitsAndBytesConfig})
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_compute_dtype == torch.float32
    assert (
        set(config.llm_int8_skip_modules) == {"llama": {"lm_head"}, "bert": {"bert.pooler.dense", "classifier"}}[family]
    )
    assert text.count("quantization_config=QUANTIZATION") == 1
    assert "QUANTIZATION" not in script(recipe_over(tmp_path / "full", family, None))


def test_axolotl_trains_by_qlora(tmp_path: Path) -> None:
    found = {}
    for quantization in ("nf4", "int8"):
        recipe = recipe_over(tmp_path, "llama", quantization)
        EXPORTERS["axolotl"].export(recipe, None, tmp_path / quantization, allow_lossy=True)
        found[quantization] = YAML(typ="safe").load(tmp_path / quantization / "axolotl.yaml")
    assert found["nf4"]["adapter"] == "qlora"
    assert found["nf4"]["load_in_4bit"] is True
    assert found["nf4"]["bnb_config_kwargs"] == {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_skip_modules": ["lm_head"],
    }
    assert found["int8"]["adapter"] == "lora"
    assert found["int8"]["load_in_8bit"] is True


def test_recipes_without_quantisation_do_not_name_it(tmp_path: Path) -> None:
    recipe = recipe_over(tmp_path, "llama", None)
    assert "quantization" not in recipe.to_dict()["backbone"]
    assert "quantization" not in recipe.host.to_dict()
