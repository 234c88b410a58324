"""LoRAs of others whose files are damaged or crafted: refused before any training, with the file named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from autopeft.search_space.adapters.given import CONFIG, MOST_CONFIG_BYTES, WEIGHTS, Given, GivenError, read
from autopeft.search_space.adapters.peft_patterns import MATCHING_S, PatternError, Patterns
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.engine.check import check

from ...support.tiny_study import save_study

PATH = "encoder.layer.0.attention.self.query"
GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"]}


def saved(folder: Path, *, tensors: dict[str, Any] | None = None, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**GOOD, **settings}))
    shapes = {"A": torch.ones(2, 16), "B": torch.ones(16, 2), **(tensors or {})}
    save_file(
        {f"base_model.model.{PATH}.lora_{name}.weight": value for name, value in shapes.items() if value is not None},
        folder / WEIGHTS,
    )
    return folder


def given(folder: Path, **settings: Any) -> Given:
    return read(str(saved(folder, **settings)))


def test_a_good_one(tmp_path):
    assert given(tmp_path).shapes == {PATH: (2, 16, 16)}
    assert given(tmp_path / "b", r=8, rank_pattern={"query": 2}, alpha_pattern={"layer.0.*": 6}).scales == {PATH: 3.0}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"lora_alpha": "16"}, "lora_alpha must be a number"),
        ({"lora_alpha": [16]}, "lora_alpha must be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number"),
        ({"lora_alpha": True}, "lora_alpha must be a number"),
        ({"use_rslora": "no"}, "use_rslora must be true or false"),
        ({"bias": {}}, "bias must be a text"),
        ({"alpha_pattern": ["query"]}, "alpha_pattern must be an object"),
        ({"alpha_pattern": {"query": "4"}}, "alpha_pattern must be an object"),
        ({"rank_pattern": "query"}, "rank_pattern must be an object"),
        ({"target_modules": 3}, "target_modules must be a text or a list"),
        ({"target_modules": [["query"]]}, "target_modules must be a text or a list"),
        ({"exclude_modules": {"query": 1}}, "exclude_modules must be a text or a list"),
        ({"r": 4}, f"says rank 4 for {PATH}, whose tensors have rank 2"),
        ({"rank_pattern": {"query": 3}}, "says rank 3"),
        ({"target_modules": ["value"]}, f"leave out {PATH}"),
        ({"target_modules": ".*value"}, f"leave out {PATH}"),
        ({"target_modules": "query"}, f"leave out {PATH}"),  # a text is the whole path in peft
        ({"exclude_modules": ["query"]}, f"leave out {PATH}"),
        ({"target_modules": "(.*"}, "is no regular expression"),
        ({"alpha_pattern": {"*": 4}}, "is no regular expression"),
        ({"alpha_pattern": {"(" * 3000: 4}}, "3,000 characters"),
        ({"target_modules": "((.|.)+)+[!?]"}, "takes too long"),
        ({"target_modules": r"(.+?)+(?=[!?])"}, "takes too long"),
        ({"alpha_pattern": {r"(?:\w|\w|.)*[!?]": 4}}, "takes too long"),
        ({"exclude_modules": "(.{1000}){1000}"}, "repeats its parts more than 1,000 times"),
        ({"exclude_modules": "(?:query){e<=3}"}, "begins no count"),
    ],
)
def test_settings(tmp_path, settings, problem):
    start = process_time()
    with pytest.raises(GivenError) as caught:
        given(tmp_path, **settings)
    assert str(caught.value).startswith(f"{tmp_path / CONFIG}: ")
    assert problem in str(caught.value)
    assert process_time() - start < MATCHING_S + 1


def test_settings_that_are_no_object(tmp_path):
    saved(tmp_path)
    for text, problem in [
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"r": ' + "1" * 5000 + "}", "not valid JSON"),
        ('"' + "x" * MOST_CONFIG_BYTES + '"', "larger than"),
    ]:
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(GivenError, match=f"{tmp_path / CONFIG}: .*{problem}"):
            read(str(tmp_path))


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"A": torch.ones(16)}, "needs matrices"),
        ({"B": torch.ones(16, 2, 1)}, "needs matrices"),
        ({"A": torch.ones(0, 16), "B": torch.ones(16, 0)}, "needs matrices"),
        ({"B": None}, "needs matrices"),
        ({"B": torch.ones(16, 3)}, "differ in rank"),
        ({"A": torch.ones(2, 16, dtype=torch.int32)}, "no real numbers"),
    ],
)
def test_tensors(tmp_path, tensors, problem):
    with pytest.raises(GivenError, match=f"{tmp_path / WEIGHTS}: .*{problem}"):
        given(tmp_path, tensors=tensors)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_files_that_are_none(tmp_path, name):
    saved(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)  # reading it would wait for ever
    with pytest.raises(GivenError, match=f"{name}: no such file"):
        read(str(tmp_path))


def test_validate_names_the_lora_that_has_other_features_than_the_model(tmp_path):
    adapters = {"lora": {"given": ["expert"], "top_k": [1, 2]}}
    study = save_study(tmp_path, space={"adapters": adapters})
    saved(tmp_path / "expert", tensors={"A": torch.ones(2, 12)})
    with pytest.raises(StudyFileError) as caught:
        check(load_study(study))
    (problem,) = caught.value.problems
    assert "study.yaml:" in problem
    assert f"{tmp_path / 'expert'}: {PATH} has 12 input and 16 output features" in problem


def test_patterns_are_anchored_as_peft_anchors_them():
    """The same answers as peft's own functions."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    paths = ["query", "a.query", "a.b.query", "a.myquery", "a.query.b", "layer.1.q", "layer.11.q", "q\n"]
    keys = ["query", "b.query", r"layer\.1\.q", "layer.1.q", "^a.*", "a|query", ".*", r"q(uery)?", "q"]
    for path in paths:
        for key in keys:
            found = Patterns().value({key: "own"}, path, "default") == "own"
            assert found == (get_pattern_key([key], path) == key), (key, path)
            for modules in (key, [key]):
                config = LoraConfig(target_modules=modules)
                assert Patterns().names(modules, path) == bool(check_target_module_exists(config, path)), (key, path)


def test_the_time_is_that_of_all_patterns_together():
    patterns, start = Patterns(), process_time()
    with pytest.raises(PatternError, match="takes too long"):
        for _ in range(1000):
            patterns.names(r"(?:\w|\w)*[!?]", "a" * 14)
    assert process_time() - start < MATCHING_S + 1


def test_a_pattern_for_every_module_is_no_matter() -> None:
    """As peft's EVA writes: the whole names of all modules of 80 layers."""
    paths = [f"model.layers.{layer}.{part}" for layer in range(80) for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    ranks = {path: i for i, path in enumerate(paths)}
    patterns = Patterns()
    for _ in ("rank_pattern", "alpha_pattern"):
        assert [patterns.value(ranks, path, None) for path in paths] == list(range(320))
