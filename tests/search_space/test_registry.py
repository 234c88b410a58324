"""Registries with plug-ins: a distribution on the path adds to them, a broken one takes nothing away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autopeft.search_space.adapters import ADAPTERS
from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.adapters.lora import Lora
from autopeft.search_space.registry import PluginWarning, Registry


def install(folder: Path, module: str, **groups: str) -> None:
    """A distribution `plugged` with the module `plugged_module` and entry points, lines by group."""
    about = folder / "plugged-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    text = "".join(f"[autopeft.{group}]\n{lines}\n" for group, lines in groups.items())
    (about / "entry_points.txt").write_text(text)
    (folder / "plugged_module.py").write_text(module)


def lora_alone() -> Registry[type[AdapterSpec]]:
    return Registry("autopeft.adapters", AdapterSpec, "kind", (Lora,))


def test_without_plugins_it_is_a_mapping() -> None:
    registry = lora_alone()
    assert dict(registry) == {"lora": Lora}
    assert "ia3" not in registry
    assert len(registry) == 1
    with pytest.raises(KeyError):
        registry["ia3"]
    registry["mine"] = Lora
    assert list(registry) == ["lora", "mine"]
    del registry["mine"]
    assert list(registry) == ["lora"]
    assert next(iter(ADAPTERS)) == "full", "the order is the order in which adapters act"


def test_a_broken_plugin_is_named_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = (
        "from dataclasses import dataclass\n"
        "from autopeft.search_space.adapters.lora import Lora\n"
        "@dataclass(frozen=True)\nclass Mine(Lora):\n    kind = 'mine'\n"
        "@dataclass(frozen=True)\nclass Other(Lora):\n    kind = 'another'\n"
        "number = 7\n"
    )
    lines = (
        "mine = plugged_module:Mine\nlora = plugged_module:Mine\nother = plugged_module:Other\n"
        "number = plugged_module:number\ngone = no_such_module:Mine"
    )
    install(tmp_path, module, adapters=lines)
    monkeypatch.syspath_prepend(tmp_path)
    registry = lora_alone()
    assert registry["lora"] is Lora
    assert "plugged_module" not in sys.modules, "loaded when they are needed"
    with pytest.warns(PluginWarning) as said:
        assert list(registry) == ["lora", "mine"]
    monkeypatch.delitem(sys.modules, "plugged_module")
    assert registry["mine"].kind == "mine"
    messages = sorted(str(warning.message) for warning in said)
    assert len(messages) == 4
    assert all("of plugged could not be loaded" in message for message in messages)
    for message, what in zip(
        messages, ("No module", "already", "not a subclass of AdapterSpec", "'other'"), strict=True
    ):
        assert what in message
    assert len(registry) == 2, "once is enough"


def test_every_registry_takes_plugins(tmp_path: Path) -> None:
    module = (
        "from dataclasses import dataclass\n"
        "from autopeft.evaluators.tasks import Classification\n"
        "from autopeft.evaluators.training.train import TrainEvaluator\n"
        "from autopeft.search_space.metrics import PerExample\n"
        "from autopeft.search_space import ADAPTERS\n"
        "from autopeft.search_space.routers import Token\n"
        "from autopeft.searchers import SEARCHERS\n"
        "from autopeft.studies.exporters.native import Native\n"
        "@dataclass(frozen=True)\nclass Spec(ADAPTERS['lora']):\n    kind = 'mine'\n"
        "class Searcher(SEARCHERS['random']):\n    name = 'mine'\n"
        "class Exporter(Native):\n    name = 'mine'\n"
        "class Task(Classification):\n    name = 'mine'\n    columns = Classification.columns | {'mine'}\n"
        "class Evaluator(TrainEvaluator):\n    name = 'mine'\n"
        "class Mine(Token):\n    name = 'mine'\n"
        "SCORE = PerExample(name='mine', unit='', maximise=True, summary='a column')\n"
    )
    kinds = {
        "adapters": "Spec",
        "evaluators": "Evaluator",
        "exporters": "Exporter",
        "metrics": "SCORE",
        "routers": "Mine",
        "searchers": "Searcher",
        "tasks": "Task",
    }
    install(tmp_path, module, **{group: f"mine = plugged_module:{name}" for group, name in kinds.items()})
    code = (
        "from autopeft.evaluators.tasks import TASKS\n"
        "from autopeft.evaluators.training.registry import EVALUATORS\n"
        "from autopeft.search_space.metrics import QUALITIES\n"
        "from autopeft.search_space.problem import METRICS, Objective\n"
        "from autopeft.search_space import ADAPTERS\n"
        "from autopeft.search_space.routers import ROUTERS\n"
        "from autopeft.searchers import SEARCHERS\n"
        "from autopeft.studies.config.loading import study_from_mapping\n"
        "from autopeft.studies.exporters import EXPORTERS\n"
        "for registry in (ADAPTERS, SEARCHERS, EXPORTERS, TASKS, EVALUATORS, ROUTERS, QUALITIES):\n"
        "    assert 'mine' in registry and list(registry)[-1] == 'mine', registry\n"
        "assert EXPORTERS['mine'].name == QUALITIES['mine'].name == 'mine'\n"
        "assert list(METRICS)[-1] == 'merged_latency_s' and Objective.of('mine').is_quality\n"
        "space = {'adapters': {'mine': {'rank': [1, 2], 'experts': 2, 'router': 'mine'}}}\n"
        "study = {'study': 'any', 'space': space, 'search': {'searcher': 'mine'}}\n"
        "study |= {'task': 'mine', 'evaluation': {'evaluator': 'mine'}}\n"
        "study_from_mapping({**study, 'objectives': ['mine', 'num_params']})\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:autopeft", "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
