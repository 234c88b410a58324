"""Studies over quantised backbones on the command line: from the file to exports, and what is refused where."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from autopeft.studies.config.loading import load_study
from autopeft.studies.config.sections.inputs import ModelSettings
from autopeft.studies.engine.session import open_ledger

from ...support.tiny_models import byte_tokenizer, save, seeded
from ...support.tiny_study import save_study, settings, write_rows

pytest.importorskip("bitsandbytes")
torch.set_num_threads(1)

NF4 = {"id": "model", "quantization": "nf4"}
SHORT = {"baselines": {"names": ["lora-r8-qv"], "learning_rates": [1e-2]}, "finalists": {"seeds": 1, "most": 1}}

Cli = Callable[..., tuple[int, str, str]]


def save_llama_study(folder: Path, **changes: Any) -> Path:
    """A causal study of seconds over a Llama with the width of a block of NF4."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = byte_tokenizer(["the cat sat on the mat"], begin=False)
    config = LlamaConfig(**shape, vocab_size=len(tokenizer), num_key_value_heads=1, bos_token_id=0, eos_token_id=1)
    save(seeded(LlamaForCausalLM, config), folder / "model", tokenizer)
    for k, (split, count) in enumerate({"train": 16, "validation": 8, "test": 8}.items()):
        rows = [{"prompt": f"row {k} {i}:", "completion": " ab" * (1 + i % 3)} for i in range(count)]
        write_rows(folder / f"{split}.jsonl", rows)
    declared = settings(task="causal-lm", model=NF4, **{**SHORT, **changes})
    declared["data"] = {key: value for key, value in declared["data"].items() if key not in ("text", "label")}
    path = folder / "study.yaml"
    YAML().dump(declared, path)
    return path


@pytest.mark.slow
def test_from_the_study_file_to_what_others_load(tmp_path: Path, cli: Cli) -> None:
    space = {"adapters": {"lora": {"at": ["attn.q", "mlp.up"], "rank": [1, 2, 4]}}}
    study = save_llama_study(tmp_path, space=space, search={"searcher": "random", "trials": 2})
    assert cli("run", study)[0] == 0
    code, out, _ = cli("resume", study, "--set", "search.trials=3", "--json")
    assert code == 0
    assert open_ledger(load_study(study)).backbone.quantization == "nf4"
    assert json.loads(cli("pareto", study, "--json")[1])
    for target in ("native", "peft", "merged", "trl-script", "axolotl"):
        code, out, err = cli(
            "export", study, "--pick", "best", "--to", target, "--allow-lossy", "--out", tmp_path / target
        )
        assert code == 0, err
        assert ("dequantised ones of nf4" in out + err) == (target == "merged")
    code, _, err = cli("train", tmp_path / "native" / "recipe.yaml", "--out", tmp_path / "trained")
    assert code == 0, err

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    found: dict[str, Any] = {}
    code_of_readme = (tmp_path / "peft" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code_of_readme.replace('FOLDER = "."', f"FOLDER = {str(tmp_path / 'peft')!r}"), found)
    adapted = found["model"]
    assert isinstance(adapted, PeftModel)
    for module in adapted.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    ids = torch.arange(2, 20).view(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_setting_is_absent_unless_it_is_set() -> None:
    assert "quantization" not in ModelSettings().model_dump(mode="json")
    assert ModelSettings(quantization="nf4").model_dump(mode="json")["quantization"] == "nf4"


def test_validate_describes_the_model_and_leaves_full_out_of_the_default_baselines(tmp_path: Path, cli: Cli) -> None:
    study = save_study(tmp_path, model=NF4, baselines={"learning_rates": [1e-2]})
    code, _, err = cli("validate", study)
    assert code == 0, err
    assert "baselines.names: full trains all weights of the model, which are frozen in nf4, so it is left out" in err
    assert "set [head, lora-r8-qv]" in err


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "full as a baseline": (
        {"baselines": {"names": ["head", "full"]}},
        ("baselines.names", "full trains all weights of the model, which are frozen in nf4: set [head]"),
    ),
    "full in the space": (
        {"space": {"adapters": {"full": {}}}, **SHORT},
        ("space.adapters.full", "its weights are quantised (nf4) and stay frozen"),
    ),
    "merged latency": (
        {"objectives": ["accuracy", "merged_latency_s"], **SHORT},
        ("objectives", "cannot be merged into weights in nf4: take latency_s"),
    ),
    "unknown": ({"model": {"id": "model", "quantization": "nf3"}, **SHORT}, ("model.quantization", "nf4", "int8")),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_with_its_line(
    tmp_path: Path, cli: Cli, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    study = save_study(tmp_path, **{"model": NF4, **changes})
    for command in ("validate", "run"):
        code, _, err = cli(command, study)
        assert code == 2, err
        for word in (f"{study}:", *words):
            assert word in err, err


def test_without_the_package_the_exit_code_is_4(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    study = save_study(tmp_path, model=NF4, **SHORT)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    for command in ("validate", "plan", "run"):
        code, _, err = cli(command, study)
        assert code == 4, err
        assert "model.quantization: a model in nf4 needs the package bitsandbytes" in err
        assert "pip install bitsandbytes" in err
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("ledger.db"))


def test_gptq_is_refused_before_anything_is_written(tmp_path: Path, cli: Cli) -> None:
    study = save_study(tmp_path, model={"id": "model"}, **SHORT)
    path = tmp_path / "model" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    for command in ("validate", "run"):
        code, _, err = cli(command, study)
        assert code == 2, err
        assert "quantised by gptq" in err
        assert "set model.quantization: nf4" in err
