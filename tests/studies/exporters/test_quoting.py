"""Texts of a recipe in exported code and markup: a file name, a label or a metric is data, never code."""

from __future__ import annotations

import ast
import io
import json
import runpy
import tokenize
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from autopeft.evaluators.data.splits import SPLITS
from autopeft.search_space.adapters import Lora
from autopeft.studies.exporters import EXPORTERS, trl_script
from autopeft.studies.exporters.axolotl import CONFIG_FILE
from autopeft.studies.recipes.parts import OwnMetric
from autopeft.studies.recipes.recipe import Recipe

from ...support.exported import LABELS, make_recipe, save_model, trained

#: Ends a docstring, a string and a comment, and then raises; it is also a valid name of a folder.
HOSTILE = 'a"""\nraise SystemExit("ran")\n"""b \'\'\' \\ \\" {x} $what ${model} %s #: é'


def hostile_recipe(folder: Path, family: str) -> Recipe:
    """Return a recipe whose model folder, labels, columns and own metric have the hostile name."""
    recipe = make_recipe(family, save_model(family, folder / HOSTILE), {"layers.1.attn.q": Lora(rank=2)})
    data = recipe.data.model_copy(update={"text": HOSTILE, "revision": HOSTILE})
    changes = {"data": data, "metrics": {HOSTILE: OwnMetric(function="mine:score")}}
    if recipe.labels:
        changes["labels"] = (HOSTILE, *LABELS[1:])
        for split in SPLITS:
            rows = [{HOSTILE: f"w1 {split}", "label": label} for label in (HOSTILE, *LABELS[1:])]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe.model_copy(update=changes)


@pytest.mark.parametrize("text", [HOSTILE, '"', "'", "\\", "'\"\\", '"""', "\r\0\ud800"])
def test_a_docstring_holds_any_text(text: str) -> None:
    source = f'"""Of {trl_script.in_docstring(text)}.\n\nMore.\n"""\n'
    assert ast.get_docstring(ast.parse(source), clean=False) == f"Of {text}.\n\nMore.\n"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_script_has_names_only_in_strings(tmp_path: Path, family: str) -> None:
    recipe = hostile_recipe(tmp_path, family)
    EXPORTERS["trl-script"].export(recipe, None, tmp_path / "out")
    source = (tmp_path / "out" / trl_script.SCRIPT_FILE).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    assert not [token for token in tokens if token.type != tokenize.STRING and "SystemExit" in token.string]

    script = runpy.run_path(str(tmp_path / "out" / trl_script.SCRIPT_FILE))  # SystemExit if the name is code
    assert script["MODEL"] == recipe.backbone.id == str(tmp_path / HOSTILE)
    assert f"lora on {recipe.backbone.id}." in script["__doc__"]
    if recipe.labels:
        assert [row["label"] for row in script["load_rows"]("train")] == list(recipe.labels)
        assert script["LABELS"] == [HOSTILE, *LABELS[1:]]
        assert f"study's own {HOSTILE} (mine:score)." in script["__doc__"]


def test_axolotl_reads_the_names_as_they_are(tmp_path: Path) -> None:
    recipe = hostile_recipe(tmp_path, "llama")
    EXPORTERS["axolotl"].export(recipe, None, tmp_path / "out")
    found = YAML(typ="safe").load((tmp_path / "out" / CONFIG_FILE).read_text(encoding="utf-8"))
    assert found["base_model"] == str(tmp_path / HOSTILE)
    assert "raise" not in found


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("target", ["peft", "merged"])
def test_the_readme_has_names_only_in_strings(tmp_path: Path, family: str, target: str) -> None:
    recipe = hostile_recipe(tmp_path, family)
    EXPORTERS[target].export(recipe, trained(recipe)[0], tmp_path / "out")
    _, metadata, page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    if target == "peft":
        assert YAML(typ="safe").load(metadata)["base_model"] == str(tmp_path / HOSTILE)
    _, code, _ = page.split("```")
    for node in ast.walk(ast.parse(code.removeprefix("python\n"))):
        assert not isinstance(node, ast.Raise | ast.Dict), "the code is the same for every name"
    assert "SystemExit" not in page.replace(code, "")
