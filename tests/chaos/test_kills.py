"""Studies that SIGKILL ends again and again, at named writes and at random moments, end as if nothing had been.

    make chaos

Every study runs once without a kill. Then further processes run it, export from it and train its recipe. Each is killed
at a write (of the ledger, of a file, to MLflow; before it or after it) or at a random moment, and the next one goes on.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import botorch  # noqa: F401  (so that the processes, which are forks, need not load them)
import mlflow
import numpy as np
import pytest
from ruamel.yaml import YAML
from safetensors.numpy import load_file

import autopeft.evaluators.training.train  # noqa: F401
from autopeft.studies.cli.app import main
from autopeft.studies.config.loading import load_study
from autopeft.studies.engine.session import open_ledger, read_snapshot

from ..studies.engine.test_kills import WRITES
from ..studies.engine.test_study import facts
from ..support.tiny_study import save_study, save_study_of

pytestmark = pytest.mark.chaos

RUNGS = {"rungs": [0.5], "keep": 0.5}
SHORT = {
    "baselines": {"names": ["head"], "learning_rates": [1.0e-2]},
    "finalists": {"seeds": 2, "most": 2},
    "training": {"learning_rate": {"low": 3.0e-2, "high": 1.0e-1, "log": True}, "epochs": 8, "batch_size": 8},
}
TRACKED = {"tracking": {"enabled": True, "uri": "sqlite:///mlflow.db"}}
PROXY = {"proxy": {"subnets": 8, "epochs": 1}}
EXPERTS = {"adapters": {"lora": {"at": ["attn.q", "attn.v"], "rank": [1, 2], "experts": [0, 2], "top_k": 1}}}
FEW = {"adapters": {"lora": {"at": ["attn.q"], "rank": [0, 1, 2]}}}


def searched(searcher: str, **changes: Any) -> dict[str, Any]:
    return {"search": {"searcher": searcher, "trials": 6, "batch": 3, **changes.pop("search", {})}, **changes}


STUDIES: dict[str, dict[str, Any]] = {
    **{name: searched(name) for name in ("random", "qmc", "tpe", "nsga2", "evolution", "bo")},
    **{name: searched(name, **PROXY) for name in ("linas", "proxy", "gates", "shrink")},
    "grid": searched("grid", space=FEW, training={**SHORT["training"], "learning_rate": [0.01, 0.1]}),
    "rungs": searched("tpe", search=RUNGS),
    "rungs-racing": searched("bo", search={"rungs": [0.3, 0.6], "keep": "auto", "trials": 8, "batch": 4}),
    "front": searched("bo", search={"goal": "front", "initial": 3}),
    "start": searched("bo", search={"start": [{"lora.rank": 4}, {"lora.rank": 1}]}),
    "limits": searched("random", constraints={"num_params": 200}),
    "tracked": searched("tpe", **TRACKED),
    "tracked-rungs": searched("tpe", search=RUNGS, **TRACKED),
    "experts": searched("random", space=EXPERTS, search={"trials": 4, "batch": 2}),
    "pair": searched("random"),
    "several": searched("tpe"),
    "macro-f1": searched("tpe", objectives=["macro-f1", "num_params"], search=RUNGS),
    "one-by-one": searched("tpe", search={"batch": 1}),
    "storage": searched("random", storage="sqlite:///elsewhere.db"),
}
#: Names of unfinished files.
TEMPORARY = re.compile(r"^\..*-\d+-[0-9a-f]{12}(\.old)?$")
#: How a study is killed, twice: at writes, or at random moments; see `deaths`.
CHAINS = ("before writes", "after writes", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """When a process kills itself: at a write, counted from 0, before it is made or after it. None: never."""

    write: int | None = None
    after: bool = False


@dataclass(slots=True, kw_only=True)
class Whole:
    """A study, its export and its training that nothing ended, to compare with."""

    writes: dict[str, list[str]] = field(default_factory=dict)
    took_s: dict[str, float] = field(default_factory=dict)
    outcome: Any = None


def make(name: str, folder: Path) -> Path:
    changes = {**SHORT, **STUDIES[name]}
    if name in ("pair", "several"):
        return save_study_of(name, folder, **changes)
    return save_study(folder, **changes)


def commands(study: Path) -> dict[str, list[str]]:
    """The commands of a user from the start to the end; each goes on where it was killed."""
    export = study.parent / "exported"
    return {
        "run": ["run", str(study), "--resume"],
        "export": ["export", str(study), "--force", "--out", str(export)],
        "train": ["train", str(export / "recipe.yaml"), "--force", "--out", str(study.parent / "trained")],
    }


def process(words: list[str], log: Path, death: Death, writes: Path) -> int:
    """Start a process that runs a command; its writes are listed in a file, and it may die at one of them."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        sys.stdout = sys.stderr = log.open("a", encoding="utf-8")
        watch(death, writes)
        main(words)
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def watch(death: Death, writes: Path) -> None:
    """List the writes of this process, and kill it at one."""
    made = 0

    def counted(owner: Any, name: str) -> None:
        write: Callable[..., Any] = getattr(owner, name)

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            nonlocal made
            own, made = made, made + 1
            with writes.open("a", encoding="utf-8") as file:
                file.write(f"{owner.__name__}.{name}\n")
            if own == death.write and not death.after:
                os.kill(os.getpid(), signal.SIGKILL)
            found = write(*arguments, **keywords)
            if own == death.write:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(owner, name, wrapped)

    client = mlflow.tracking.MlflowClient
    for owner, name in (*WRITES, (os, "replace"), (os, "rename"), (client, "create_run"), (client, "log_batch"),
                        (client, "set_terminated"), (client, "create_experiment")):  # fmt: skip
        counted(owner, name)


def wait(child: int, until_s: float | None = None) -> int | None:
    """Return the exit status, or None if SIGKILL ended it: its own, or ours after some seconds."""
    begun = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        if until_s is not None and time.monotonic() - begun > until_s:
            os.kill(child, signal.SIGKILL)
            until_s = None
        time.sleep(0.01)


def outcome(study: Path) -> dict[str, Any]:
    """Return all that a user has in the end and that must not depend on kills."""
    settings = load_study(study)
    snapshot = read_snapshot(settings, open_ledger(settings))
    folder = study.parent
    rows = [row.to_dict(snapshot.quality) for row in snapshot.rows()]
    return {
        "trials": facts(list(snapshot.trials)),
        "front": rows,
        "weights": files(settings.output_folder / "weights"),
        "exported": files(folder / "exported"),
        "trained": files(folder / "trained"),
        "temporary": sorted(path.name for path in folder.rglob("*") if TEMPORARY.search(path.name)),
        "tracked": tracked(folder / "mlflow.db", settings.study),
    }


def files(folder: Path) -> dict[str, Any]:
    """Return what the files in a folder hold, by name: tensors, or the text without the folder's name and times."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("[!.]*") if path.is_file()):
        if path.suffix == ".safetensors":
            data: Any = load_file(path)
        else:
            data = YAML(typ="safe").load(path.read_text().replace(str(folder.parent), ""))
            data.get("provenance", {}).pop("created", None)
        found[str(path.relative_to(folder))] = data
    return found


def same(one: Any, other: Any) -> bool:
    """Return whether two outcomes are equal but for the last digits of their numbers.

    What is left of a batch after a kill is trained in a smaller pack, where sums have another order.
    """
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, (float, np.ndarray)):
        return bool(np.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True))
    return bool(one == other)


def tracked(database: Path, study: str) -> list[tuple[Any, ...]]:
    """Return what MLflow has of each trial: its status and its scores, and how often."""
    if not database.exists():
        return []
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    return sorted(
        (run.data.tags.get("autopeft.trial", ""), run.info.status, sorted(
            (name, value) for name, value in run.data.metrics.items() if name in ("accuracy", "num_params")
        )) for run in runs
    )  # fmt: skip


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow: its first migration takes ten seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    child = os.fork()
    if not child:
        try:
            mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
        finally:
            os._exit(0)
    assert wait(child) == 0
    return path


def prepared(name: str, folder: Path, migrated: Path) -> Path:
    study = make(name, folder)
    if "tracking" in STUDIES[name]:
        with closing(sqlite3.connect(migrated)) as old, closing(sqlite3.connect(folder / "mlflow.db")) as new:
            old.backup(new)
    return study


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in STUDIES])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, migrated: Path
) -> tuple[str, Whole]:
    """One study that nothing ends."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    study = prepared(name, folder / "study", migrated)
    found = Whole()
    for command, words in commands(study).items():
        begun, writes = time.monotonic(), folder / f"{command}.txt"
        writes.touch()
        status = wait(process(words, folder / "log", Death(), writes))
        assert status == 0, (folder / "log").read_text()[-3000:]
        found.took_s[command] = time.monotonic() - begun
        found.writes[command] = writes.read_text().split("\n")[:-1]
    found.outcome = outcome(study)
    return name, found


def deaths(chain: str, writes: int, rng: random.Random) -> list[Death | None]:
    """Return when the processes of a chain die; None: at a random moment."""
    if chain == "random":
        return [None, None]
    first = Death(write=rng.randrange(writes), after=chain == "after writes")
    # What is left after the first death has fewer writes.
    return [first, Death(write=rng.randrange(1, max(2, writes // 4)), after=rng.random() < 0.5)]


@pytest.mark.parametrize("chain", CHAINS)
def test_kills_change_nothing(
    whole: tuple[str, Whole],
    chain: str,
    tmp_path: Path,
    migrated: Path,
    record_property: Callable[[str, object], None],
) -> None:
    name, expected = whole
    rng = random.Random(f"{name} {chain}")
    study = prepared(name, tmp_path / "study", migrated)
    history = []
    for command, words in commands(study).items():
        planned = deaths(chain, len(expected.writes[command]), rng)
        # A training and an export are short: one death is enough.
        for death in planned if command == "run" else planned[:1]:
            until_s = rng.uniform(0.0, expected.took_s[command]) if death is None else None
            writes = tmp_path / "writes.txt"
            writes.write_text("")
            if wait(process(words, tmp_path / "log", death or Death(), writes), until_s) is None:
                last = (writes.read_text().split() or ["start"])[-1]
                history.append(f"{command}: {'after ' if until_s is None else f'at {until_s:.2f} s, after '}{last}")
        status = wait(process(words, tmp_path / "log", Death(), tmp_path / "writes.txt"))
        assert status == 0, f"{history}\n{(tmp_path / 'log').read_text()[-3000:]}"
    record_property("kills", len(history))
    found = outcome(study)
    for part, value in expected.outcome.items():
        assert same(value, found[part]), f"{part} differs after {history}:\n{value}\n{found[part]}"
