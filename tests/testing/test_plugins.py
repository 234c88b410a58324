"""The page on plug-ins as a distribution: its examples pass the checks of `autopeft.testing`, wrong ones do not."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autopeft.evaluators.tasks import TASKS
from autopeft.evaluators.training.registry import EVALUATORS
from autopeft.search_space.adapters import ADAPTERS, Lora, Mixture
from autopeft.search_space.metrics import QUALITIES
from autopeft.search_space.registry import Registry
from autopeft.search_space.routers import ROUTERS
from autopeft.searchers import SEARCHERS
from autopeft.studies.exporters import EXPORTERS
from autopeft.testing import check_adapter, check_exporter, check_metric, check_searcher, check_task
from autopeft.testing.models import tiny

from ..search_space.test_registry import install
from ..support.exported import make_recipe, save_model, trained
from ..support.tiny_models import word_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
MODULE = "\n\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
TASK_ROWS = [{"text": "W1 w2", "label": "a"}, {"text": "w3 w4 w5", "label": "b"}]
REGISTRIES: tuple[Registry[Any], ...] = (ADAPTERS, ROUTERS, QUALITIES, TASKS, EVALUATORS, SEARCHERS, EXPORTERS)


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """The package of the page, with the parameter's change of its text."""
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    groups = tomllib.loads(text)["project"]["entry-points"]
    lines = {
        group.removeprefix("autopeft."): "\n".join(
            f"{name} = {value.replace('my_package', 'plugged_module')}" for name, value in entries.items()
        )
        for group, entries in groups.items()
    }
    assert set(groups) == {registry.group for registry in REGISTRIES}, "an example of each group"
    old, new = getattr(request, "param", ("", ""))
    assert old in MODULE
    install(tmp_path, MODULE.replace(old, new), **lines)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_plugins", None)
    yield
    sys.modules.pop("plugged_module", None)


@pytest.mark.usefixtures("plugged")
@pytest.mark.filterwarnings("error::autopeft.search_space.registry.PluginWarning")
def test_the_examples_pass(tmp_path: Path) -> None:
    check_adapter(ADAPTERS["gain"]())
    check_adapter(Mixture(router="cosine"))
    check_metric(QUALITIES["worst-recall"])
    check_searcher("drawn")
    recipe = make_recipe("bert", save_model("bert", tmp_path / "model"), {"layers.1.attn.q": Lora()})
    (tmp_path / "exports").mkdir()
    check_exporter(EXPORTERS["card"], recipe, trained(recipe)[0], tmp_path / "exports")
    check_task(TASKS["lower-case"](word_tokenizer(), 8, ["a", "b", "c"]), TASK_ROWS, tiny("bert")[0])
    assert EVALUATORS["logged"].name == "logged"


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize(
    ("plugged", "message"),
    [
        (("return 0  #", "return 2 * site.out_features  #"), "flops_per_token says [0-9]+, and 0 are counted"),
        (("decay=False)", 'decay=False, init="ones")'), "identity_at_start is declared, and the untrained adapter"),
        (
            ("    def flops_per_token", "    def num_params(self, site):\n        return 1\n\n    def flops_per_token"),
            "num_params says 1[0-9]*, and [0-9]+ are trained",
        ),
        (("else bias * gain", "else bias"), "merged_is_unmerged of Gain"),
        (("y * (1 + p", "y * (1 + 0 * p"), "trained values change the logits by .* at most"),
    ],
    indirect=["plugged"],
)
def test_what_is_wrong_with_an_adapter_is_said(message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_adapter(ADAPTERS["gain"](), families=("bert",))


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize(
    ("plugged", "message"), [(("return float(min(", "return 2 * float(min("), "beyond the bound")], indirect=["plugged"]
)
def test_what_is_wrong_with_a_metric_is_said(message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_metric(QUALITIES["worst-recall"])


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize(
    ("plugged", "message"), [(('Random(f"{self.seed} {number}")', "Random()"), "another suggestion")],
    indirect=["plugged"],
)  # fmt: skip
def test_what_is_wrong_with_a_searcher_is_said(message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_searcher("drawn")


LOWER_CASE = '    name = "lower-case"\n'


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize(
    ("plugged", "message"),
    [
        ((LOWER_CASE, f'{LOWER_CASE}    columns = frozenset({{"loss"}})\n'), r"declares \['loss'\], returns"),
        ((LOWER_CASE, f"{LOWER_CASE}    has_labels = False\n"), "has_labels is False, but labels_of says True"),
        (
            (LOWER_CASE, f'{LOWER_CASE}\n    def collate(self, examples):\n        batch = super().collate(examples)\n'
             '        return batch | {"input_ids": batch["input_ids"].roll(1, 0)}\n'),
            "loss of row 0 depends on the rest of its batch",
        ),
    ],
    indirect=["plugged"],
)  # fmt: skip
def test_what_is_wrong_with_a_task_is_said(message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_task(TASKS["lower-case"](word_tokenizer(), 8, ["a", "b", "c"]), TASK_ROWS, tiny("bert")[0])
