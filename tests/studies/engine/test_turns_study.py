"""Studies over conversations: which turns they learn, from the file to ledgers of earlier versions and to exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from autopeft.evaluators.data.splits import load_splits
from autopeft.evaluators.tasks.base import IGNORED
from autopeft.evaluators.tasks.causal_lm import CausalLM
from autopeft.studies.config.fingerprint import fingerprint
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.check import check
from autopeft.studies.recipes.recipe import Recipe

from ...support.chat_templates import LLAMA
from ...support.tiny_models import byte_tokenizer, save, seeded
from ...support.tiny_study import save_study, settings, write_rows
from .test_metrics_study import cli

SHORT: dict[str, Any] = {
    "task": "causal-lm",
    "objectives": ["loss", "num_params"],
    "baselines": {"names": ["lora-r8-qv"], "learning_rates": [1.0e-2]},
    "finalists": {"seeds": 1, "most": 1},
    "search": {"searcher": "random", "trials": 1},
}
CHAT = [
    {"from": "human", "value": "question 1"},
    {"from": "gpt", "value": "answer 1"},
    {"from": "human", "value": "and?"},
    {"from": "gpt", "value": "no"},
]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = save_study(tmp_path, data=settings()["data"] | {"max_length": 200}, **SHORT)
    words = byte_tokenizer(["a question and an answer"], size=280)
    words.chat_template = LLAMA
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(**shape, vocab_size=280, max_position_embeddings=256)
    save(seeded(LlamaForCausalLM, config), tmp_path / "model", words)
    for split in ("train", "validation", "test"):
        rows = [{"conversations": json.loads(json.dumps(CHAT).replace("question", f"{split} {i}"))} for i in range(6)]
        write_rows(tmp_path / f"{split}.jsonl", rows)
    return path


def exported_rows(study: Path, folder: Path, target: str, *words: str) -> tuple[list[dict[str, Any]], Recipe]:
    pick = ["--pick", "trial:0", "--allow-lossy", "--force"]
    assert cli(["export", str(study), "--to", target, "--out", str(folder), *pick, *words]) == 0
    lines = (folder / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], Recipe.load(folder / "recipe.yaml")


def learnt(study: Path, row: dict[str, Any]) -> str:
    words = AutoTokenizer.from_pretrained(study.parent / "model")
    return str(words.decode([label for label in row["labels"] if label != IGNORED]))


def test_the_default_is_written_down_for_conversations_alone(study, tmp_path):
    found = load_study(study)
    assert found.data.model_dump()["train_on_turns"] == fingerprint(found)["data"]["train_on_turns"] == "all"
    assert "train_on_turns" not in found.data.model_fields_set
    before = load_study(study, ["data.train_on_turns=last"])
    assert fingerprint(before)["data"].keys() == fingerprint(found)["data"].keys() - {"train_on_turns"}
    other = load_study(save_study(tmp_path / "other"))
    assert {"messages", "system", "train_on_turns"}.isdisjoint(other.data.model_dump())


def test_what_is_exported_is_what_was_measured(study, tmp_path):
    assert cli(["run", str(study)]) == 0
    splits, _, _ = check(load_study(study))
    for target in ("trl-script", "axolotl"):
        rows, recipe = exported_rows(study, tmp_path / target, target)
        assert recipe.data.train_on_turns == "all"
        assert learnt(study, rows[0]) == "answer 1</s>no</s>"
        assert splits.encoded is not None
        for row, example in zip(rows, splits.encoded.examples["train"], strict=True):
            assert (row["input_ids"], row["labels"]) == (example["input_ids"], example["labels"])


@pytest.mark.slow
def test_a_study_from_before_there_was_a_choice_goes_on(study, tmp_path, capsys):
    """Its ledger and its recipes lack the setting, and it learnt the last turn."""
    last = ["--set", "data.train_on_turns=last"]
    assert cli(["run", str(study), *last]) == 0
    rows, recipe = exported_rows(study, tmp_path / "last", "trl-script")
    assert "train_on_turns" not in (tmp_path / "last" / "recipe.yaml").read_text()
    assert learnt(study, rows[0]) == "no</s>"
    assert "turns" not in load_splits(recipe.data.for_loading(), recipe.task).train[0]
    more = ["--set", "search.trials=2"]
    assert cli(["resume", str(study), *more]) == 0
    assert cli(["resume", str(study), *more, *last]) == 0
    splits, _, _ = check(load_study(study))
    assert splits.encoded is not None
    assert learnt(study, splits.encoded.examples["train"][0]) == "no</s>"
    capsys.readouterr()
    assert cli(["resume", str(study), *more, "--set", "data.train_on_turns=all"]) == 2
    assert 'data.train_on_turns: "all" was added' in capsys.readouterr().err


def test_a_recipe_trains_the_turns_of_its_study(study, tmp_path, capsys):
    assert cli(["run", str(study)]) == 0
    _, recipe = exported_rows(study, tmp_path / "native", "trl-script")
    assert load_splits(recipe.data.for_loading(), recipe.task).train[0]["turns"] == "all"
    assert cli(["train", str(tmp_path / "native" / "recipe.yaml"), "--out", str(tmp_path / "trained")]) == 0


def test_the_setting_is_for_conversations(tmp_path, capsys):
    for name in ("system", "messages", "train_on_turns"):
        value = "all" if name == "train_on_turns" else "x"
        path = save_study(tmp_path / name, data=settings()["data"] | {name: value})
        capsys.readouterr()
        assert cli(["validate", str(path)]) == 2
        assert f"data.{name}: can be set only for causal-lm" in capsys.readouterr().err


def test_the_task_says_that_it_has_turns():
    assert CausalLM.has_turns
