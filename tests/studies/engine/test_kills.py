"""A study that dies at any of its writes goes on as the very study that was not killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest

from autopeft.studies.analysis.snapshot import Snapshot
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.session import was_started

from ...support.slow import slow
from ...support.tiny_study import save_study
from .test_study import facts, run

#: All by which the ledger writes.
WRITES = ((optuna.Study, "add_trial"), (optuna.Study, "set_user_attr"), (optuna.Study, "tell"),
          (optuna.trial.Trial, "set_user_attr"), (optuna.trial.Trial, "set_constraint"))  # fmt: skip
STUDY = {
    "search": {"searcher": "tpe", "trials": 6, "batch": 3, "rungs": [0.5], "keep": 0.5},
    "finalists": {"seeds": 1, "most": 1},
    "baselines": {"names": ["head"], "learning_rates": [0.1]},
}


class KilledError(BaseException):
    """In place of SIGKILL: no code catches it, and what comes after it does not run."""


@contextmanager
def killed_at(write: int) -> Iterator[list[str]]:
    """End everything at a write of the ledger, before it is made; yield the names of the writes."""
    made: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in WRITES:
            patch.setattr(owner, name, _counted(getattr(owner, name), f"{owner.__name__}.{name}", made, write))
        yield made


def _counted(write: Callable[..., Any], name: str, made: list[str], last: int) -> Callable[..., Any]:
    def counted(*arguments: Any, **keywords: Any) -> Any:
        if len(made) == last:
            raise KilledError
        made.append(name)
        return write(*arguments, **keywords)

    return counted


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshot, list[str]]:
    return recorded(load_study(save_study(tmp_path_factory.mktemp("whole"), **STUDY)))


def recorded(settings: StudyFile) -> tuple[Snapshot, list[str]]:
    """Run a study to its end; return it with the names of its writes."""
    with killed_at(-1) as made:
        snapshot = run(settings)
    return snapshot, made


def killed(settings: StudyFile, write: int) -> None:
    with killed_at(write), pytest.raises(KilledError):
        run(settings)


@pytest.mark.slow
def test_a_kill_within_a_batch_changes_nothing(whole: tuple[Snapshot, list[str]], tmp_path: Path) -> None:
    """Trained together and compared at a rung, its trials are recorded together: at each of these writes."""
    snapshot, made = whole
    batch = [i for i, name in enumerate(made) if name == "Study.set_user_attr" and i > made.index("Study.add_trial")]
    for write in range(batch[0], batch[1] + 1):  # from the batch's results to their end
        goes_on(snapshot, made, write, tmp_path)


@pytest.mark.parametrize("part", [slow(0), 1, slow(2)])
def test_a_kill_anywhere_changes_nothing(whole: tuple[Snapshot, list[str]], tmp_path: Path, part: int) -> None:
    snapshot, made = whole
    goes_on(snapshot, made, len(made) * (2 * part + 1) // 6, tmp_path)


def goes_on(snapshot: Snapshot, made: list[str], write: int, folder: Path, study: Mapping[str, Any] = STUDY) -> None:
    settings = load_study(save_study(folder / str(write), **study))
    killed(settings, write)
    again = run(settings, resume=was_started(settings))
    assert facts(list(again.trials)) == facts(list(snapshot.trials)), f"killed at write {write}, {made[write]}"
