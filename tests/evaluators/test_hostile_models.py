"""Folders of models whose configuration asks for the impossible: refused before anything of that size is built."""

from __future__ import annotations

import json
import os
from pathlib import Path
from time import process_time

import pytest
from torch import nn

from autopeft.evaluators import backbones
from autopeft.evaluators.backbones import MOST_CONFIG_BYTES, skeleton
from autopeft.evaluators.errors import ModelError
from autopeft.search_space.backbones.backbone import MOST_LAYERS

from ..support.tiny_study import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model):
    """The file, which each test may change."""
    file = model / "config.json"
    text = file.read_text()
    yield file
    if file.exists():
        file.unlink()
    file.write_text(text)


def refused(file: Path) -> str:
    start = process_time()
    with pytest.raises(ModelError) as caught:
        skeleton(str(file.parent))
    assert process_time() - start < 5
    assert str(file.parent) in str(caught.value)
    return str(caught.value)


def test_names_of_labels_are_no_settings(config: Path) -> None:
    """Labels of ImageNet, for instance."""
    labels = {"tape player": 848, "one layer": 501, "size": 10**9}
    names = {"label2id": labels, "id2label": {str(i): name for name, i in labels.items()}}
    found = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(found | names), encoding="utf-8")
    assert skeleton(str(config.parent)).config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_hidden_layers": 10**9}, f"num_hidden_layers: 1e+09; a model may have {MOST_LAYERS}"),
        ({"num_hidden_layers": MOST_LAYERS + 1}, "num_hidden_layers: 501; a model may have 500"),
        ({"num_hidden_layers": float("inf")}, "num_hidden_layers: inf"),
        ({"num_hidden_layers": "3"}, "Validation error for field 'num_hidden_layers': TypeError"),
        ({"text_config": {"n_layer": 10**9}}, "n_layer: 1e+09"),
        ({"hidden_size": 10**12}, "hidden_size: 1e+12; a model may have 100,000,000"),
        ({"vocab_size": 10**12}, "vocab_size: 1e+12"),
        ({"num_attention_heads": 10**9}, "num_attention_heads: 1e+09"),
        ({"num_labels": 10**7}, "num_labels: 1e+07; a model may have 100,000"),
        ({"model_type": ["bert"]}, "the configuration could not be loaded"),
        ({"hidden_size": float("nan")}, "hidden_size: nan"),
    ],
)
def test_numbers(config, changes, problem):
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    assert problem in refused(config)


def test_texts(config):
    for text, problem in [
        ("[]", "is not a JSON object"),
        ("[" * 100_000, "is nested too deeply"),
        ("{", "not a valid JSON file"),
        ('{"a": "' + "x" * MOST_CONFIG_BYTES + '"}', "is larger than"),
    ]:
        config.write_text(text)
        assert problem in refused(config)
    config.unlink()
    os.mkfifo(config)
    assert "is not a file" in refused(config)


def test_any_other_way_to_many_modules(model, monkeypatch):
    """Whatever setting asks for them: what counts is the modules that are made."""
    monkeypatch.setattr(backbones, "MOST_MODULES", 50)
    with pytest.raises(ModelError, match="more than 50 modules"):
        skeleton(str(model))
    nn.Sequential(*(nn.Identity() for _ in range(60)))  # the bound holds for models that are described, no others
