"""Recipes: what is written is what is read, and what is wrong is named with its line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from autopeft.evaluators.base import Outcome
from autopeft.search_space.adapters import Bottleneck, Lora, Norm
from autopeft.studies.engine.retraining import Retrained, promises_met
from autopeft.studies.errors import UserError
from autopeft.studies.recipes.parts import Averaged, Measured
from autopeft.studies.recipes.recipe import SCHEMA_VERSION, Recipe, RecipeError

from ...support.exported import make_recipe, save_model

PLACEMENT = {
    "layers.11.attn.q": Lora(rank=3, alpha=4.0, dropout=0.1),
    "layers.2.attn.q": (Lora(rank=2), Lora(rank=4, scaling="rslora")),
    "layers.2.mlp": Bottleneck(size=5),
    "layers.0.norm.0": Norm(),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_recipe("bert", save_model("bert", tmp_path_factory.mktemp("recipe") / "model"), PLACEMENT)


def edited(recipe: Recipe, path: Path, old: str, new: str) -> Path:
    recipe.save(path)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


def test_what_is_written_is_what_is_read(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    recipe.save(path)
    again = Recipe.load(path)
    assert again == recipe
    assert again.candidate.key == recipe.candidate.key
    assert again.host == recipe.host
    again.save(tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == path.read_text()


def test_a_recipe_from_before_mixtures_is_read(recipe: Recipe, tmp_path: Path) -> None:
    data = {key: value for key, value in recipe.to_dict().items() if key not in ("domains", "averaged")}
    YAML().dump(data, tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_a_promise_without_spread_is_kept_as_closely_as_scores_are_written(recipe: Recipe) -> None:
    """Where nothing is trained, each seed has the same scores, and the study has them with four decimals."""
    promised = {"loss": Measured(value=5.68624, low=5.68624, high=5.68624, split="test", seeds=(1, 2))}
    of = recipe.model_copy(update={"measured": promised})
    for loss, expected in ((5.686245, True), (5.6861, True), (5.6865, False)):
        assert promises_met(of, [Retrained(seed=3, test={"loss": loss}, outcome=Outcome())]) == {"loss": expected}


def test_domains_and_the_price_of_averaging_are_kept(recipe: Recipe, tmp_path: Path) -> None:
    price = {"accuracy": Averaged(value=0.5, routed=0.6, seeds=(1, 2))}
    mixed = Recipe.model_validate(recipe.to_dict() | {"domains": ["2", "10"], "averaged": price})
    mixed.save(tmp_path / "recipe.yaml")
    again = Recipe.load(tmp_path / "recipe.yaml")
    assert (again.domains, again.averaged) == (("2", "10"), price)
    assert again == mixed


def test_sites_are_those_in_use_in_the_order_of_the_layers(recipe: Recipe) -> None:
    assert list(recipe.sites) == [
        "layers.0.norm.0",
        "layers.2.attn.q",
        "layers.2.mlp",
        "layers.11.attn.q",
        "head.classifier",
    ]
    assert [site.name for site in recipe.head_sites] == ["head.classifier"]
    assert recipe.num_adapter_params == sum(spec.num_params(recipe.sites[name]) for name, spec in recipe.adapters)


def test_it_is_for_people_too(recipe: Recipe, tmp_path: Path) -> None:
    recipe.save(tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text()
    assert text.startswith("# autopeft recipe")
    assert "autopeft verify" in text
    assert max(map(len, text.splitlines())) < 300
    assert YAML(typ="safe").load(text)["training"]["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("old", "new", "key", "what", "at"),
    [
        ("seed: 3", "sead: 3", "sead", "did you mean 'seed'", "sead"),
        (
            "  hidden_size:",
            "  hiden_size:",
            "backbone.hiden_size",
            "did you mean 'hidden_size'",
            "hiden_size",
        ),
        ("learning_rate:", "learning_rte:", "training", "did you mean 'learning_rate'", "training"),
        ("std_err:", "std_error:", "measured.accuracy.std_error", "did you mean 'std_err'", "std_error"),
        (
            "kind: lora",
            "kind: lorra",
            "architecture.layers.2.attn.q.0",
            "unknown adapter kind 'lorra'",
            "lorra",
        ),
        ("rank: 3", "rank: 0", "architecture.layers.11.attn.q.0", "rank must be at least 1", "rank: 0"),
        (
            "task: classification",
            "task: other",
            "task",
            "unknown task 'other'; known: causal-lm, classification",
            "other",
        ),
        ("study: demo", "", "provenance.study", "is missing", "provenance"),
    ],
)
def test_a_problem_has_its_line(
    recipe: Recipe, tmp_path: Path, old: str, new: str, key: str, what: str, at: str
) -> None:
    path = edited(recipe, tmp_path / "recipe.yaml", old, new)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    line = next((x for x in caught.value.problems if what in x), "")
    place, found, _ = line.split(" ", 2)
    assert found == f"{key}:", str(caught.value)
    number = int(place.removeprefix(f"{path}:"))
    written = path.read_text().splitlines()[number - 1]
    assert at in written, (number, written)


def test_all_problems_come_at_once(recipe: Recipe, tmp_path: Path) -> None:
    path = edited(recipe, tmp_path / "recipe.yaml", "seed: 3", "sead: 3\nextra: 1")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert len(caught.value.problems) == 2


def test_a_newer_schema_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    newer = f"schema_version: {SCHEMA_VERSION + 1}\nunheard_of: 1"
    path = edited(recipe, tmp_path / "recipe.yaml", f"schema_version: {SCHEMA_VERSION}", newer)
    with pytest.raises(RecipeError, match="made by a newer version of autopeft: upgrade") as caught:
        Recipe.load(path)
    assert "unheard_of" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [1\n", "a: 1\na: 2\n"])
def test_what_is_not_a_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        Recipe.load(path)


def test_a_missing_file_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Recipe.load(tmp_path / "none.yaml")


def test_adapters_must_have_a_site_that_takes_them(recipe: Recipe) -> None:
    data = recipe.to_dict()
    with pytest.raises(
        ValueError, match=r"layers\.3\.attn\.q is not among the sites; did you mean 'layers\.2\.attn\.q'"
    ):
        Recipe.model_validate(data | {"architecture": {"layers.3.attn.q": [Lora().to_dict()]}})
    with pytest.raises(ValueError, match=r"layers.0.norm.0 lora: cannot be attached"):
        Recipe.model_validate(data | {"architecture": {"layers.0.norm.0": [Lora().to_dict()]}})


def test_nothing_half_written(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("the old one")

    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        recipe.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]
    assert path.read_text() == "the old one"
