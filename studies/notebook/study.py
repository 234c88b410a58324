"""A study that is declared in Python and run by the same engine as study files."""

from __future__ import annotations

import io
import json
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from autopeft.evaluators.atomic import atomic_write_text
from autopeft.studies.config.fingerprint import differences
from autopeft.studies.config.loading import load_study, study_from_mapping
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.config.study_file import FILE_NAME, StudyFile
from autopeft.studies.errors import ConfigurationError, file_errors
from autopeft.studies.notebook.arguments import in_argument_terms, settings_of
from autopeft.studies.notebook.result import Result, errors_in_argument_terms
from autopeft.studies.notebook.tables import Tables
from autopeft.studies.urls import without_password

if TYPE_CHECKING:
    import os

    from autopeft.evaluators.data.splits import Splits
    from autopeft.search_space.metrics import Quality
    from autopeft.studies.engine.watcher import Watcher

HEADER = (
    "# Written by autopeft.Study, which replaces it. `autopeft run --resume` and the other commands take it, too.\n"
)


class Study:
    """A search over adapters for one model and one data set: a study file, declared in Python.

    `model`: a hub id, a folder, or "embedded", a small English encoder.
    `data`: a folder with one file each for train, validation and test; a mapping of these splits to tables (data
    frames, data sets, lists of dicts) that may also name the columns; the settings of a study file; or None for the
    embedded rows. Without test rows, half of a validation table is set aside for the test.
    `space`: the name of a preset, objects (`AdapterChoice`, `OneOf`, with `Choice`, `Int` and `Float` as values), or
    the settings of a study file.
    `objectives`: two to four metrics. `metric`: the quality to optimise: a name, a metric object, or a function of two
    integer arrays, targets and predictions, that returns a number. Larger is better, unless it is among the objectives
    with another direction: `{"name": "my_cost", "direction": "minimise"}`. It becomes the first objective unless it is
    already one. A function is recorded as `module:function`, so other processes find it only if they can import its
    module, which is impossible for a function of a notebook. A metric object is registered in this process; other
    processes need it from a plug-in.
    `forgetting`: retained rows for the objective of this name: a table, a file, "embedded-prose", or the settings of a
    study file.
    `trials`: number of candidates to try. `name`: name of the study. `folder`: folder of all its files, `runs/<name>`
    by default. All other settings of a study file are keyword arguments: `training`, `constraints`, `search`,
    `baselines`, `finalists`, `seed`, `task` and so on.

    Raises StudyFileError, a UserError, with every problem that can be found without the model and the rows. Only `run`
    writes files.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Mapping[str, Any] = "embedded",
        data: Any = None,
        space: Any = None,
        objectives: Sequence[str | Mapping[str, Any]] | None = None,
        trials: int | None = None,
        *,
        metric: str | Quality | Callable[[Any, Any], Any] | None = None,
        name: str = "study",
        folder: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        with _arguments_named():
            self._mapping, self._tables = settings_of(
                name=name,
                model=model,
                data=data,
                space=space,
                objectives=objectives,
                metric=metric,
                trials=trials,
                others=settings,
            )
            self.folder = Path(Path("runs") / str(name) if folder is None else folder).expanduser().absolute()
            #: The settings as the engine takes them.
            self.settings: StudyFile = study_from_mapping(self._mapping, self.folder)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Study:
        """Load the study of a study file, or of the `study.yaml` in a folder."""
        study = cls.__new__(cls)
        study.settings = load_study(Path(path), environment={})
        study.folder = study.settings.folder
        study._mapping, study._tables = {}, Tables({})
        return study

    def check(self) -> None:
        """Check the rows, the model's configuration and the space. Raises StudyFileError with every problem.

        It neither loads weights nor writes files.
        """
        self._checked()

    def run(self, progress: bool | Watcher = True) -> Result:
        """Run the study, or resume it after an interruption or with more trials than before.

        An interrupt stops it at the next step, without loss. `progress`: True shows lines and a bar, False nothing; a
        `Watcher` is called at every step. Raises UserError.
        """
        from rich.console import Console

        from autopeft.studies.cli.progress import ProgressView, stopping_between_steps
        from autopeft.studies.engine.session import open_study, was_started
        from autopeft.studies.reports.report import write_report
        from autopeft.studies.storage.database import GO_ON

        with errors_in_argument_terms():
            self._check_folder()
            splits = self._checked()
            # Python delivers signals only to the main thread.
            signals = (signal.SIGINT,) if threading.current_thread() is threading.main_thread() else ()
            with (
                stopping_between_steps(*signals) as stop_if_asked,
                open_study(self.settings, splits, resume=was_started(self.settings)) as study,
            ):
                with file_errors(GO_ON):
                    self._write()
                space = study.problem.space
                for note in study.evaluator.notes_on(space.decode(space.largest())):
                    warnings.warn(note, stacklevel=2)
                if isinstance(progress, bool):
                    with ProgressView(None if progress else Console(quiet=True), between=stop_if_asked) as view:
                        snapshot = study.run(view)
                else:
                    snapshot = study.run(progress)
                for problem in write_report(snapshot, self.settings.output_folder / "report").problems:
                    warnings.warn(problem, stacklevel=2)
        return Result(self.settings, snapshot)

    def result(self) -> Result:
        """Return the results so far; safe while the study runs. Raises ConfigurationError if it was never started."""
        from autopeft.studies.engine.session import open_ledger, read_snapshot, recorded_settings

        ledger = open_ledger(self.settings)
        settings = recorded_settings(self.settings, ledger)
        return Result(settings, read_snapshot(settings, ledger))

    def __repr__(self) -> str:
        objectives = ", ".join(objective.name for objective in self.settings.objectives)
        return f"Study({self.settings.study!r}: {self.settings.search_words} for {objectives}, in {self.folder})"

    def _checked(self) -> Splits:
        from autopeft.studies.engine.check import check, reading_as_started

        with _arguments_named():
            if self._tables.files:
                # All checks read files; tables with problems must not leave files behind.
                with TemporaryDirectory() as draft:
                    self._tables.write(Path(draft))
                    in_draft = study_from_mapping(self._mapping, draft)
                    splits, _, _ = check(in_draft.model_copy(update={"data": reading_as_started(self.settings).data}))
            else:
                splits, _, _ = check(self.settings)
        for warning in (*self._tables.warnings, *splits.warnings):
            warnings.warn(in_argument_terms(warning), stacklevel=3)
        return splits

    def _check_folder(self) -> None:
        """Raise ConfigurationError if the folder has another study, or this study with other rows."""
        from autopeft.studies.engine.session import was_started

        if not self._mapping:
            return
        file = self.folder / FILE_NAME
        if file.is_file() and not file.read_text(encoding="utf-8").startswith(HEADER):
            other = load_study(file, environment={})
            differ = differences(_shown(other), _shown(self.settings))
            if differ:
                raise ConfigurationError(
                    f"{file} is another study; choose another folder, or open that study by Study.load:\n  "
                    + "\n  ".join(differ)
                )
            self.settings = other  # equal settings, with the file names that its trials were started with
        changed = self._tables.changed(self.folder)
        if changed and was_started(self.settings):
            raise ConfigurationError(
                f"data: the rows of {' and '.join(changed)} have changed since the study in {self.folder} was started,"
                " so new trials could not be compared with its trials: choose another folder"
            )

    def _write(self) -> None:
        """Write the study file and the rows; `_check_folder` must come first."""
        if not self._mapping:
            return
        self.folder.mkdir(parents=True, exist_ok=True)  # the output may be elsewhere
        self._tables.write(self.folder)
        file = self.folder / FILE_NAME
        if file.is_file() and not file.read_text(encoding="utf-8").startswith(HEADER):
            return  # a file of the user, with equal settings
        text = io.StringIO()
        text.write(HEADER)
        yaml = YAML()
        yaml.default_flow_style = False
        yaml.dump({key: self._mapping[key] for key in StudyFile.model_fields if key in self._mapping}, text)
        atomic_write_text(file, text.getvalue())


def _shown(settings: StudyFile) -> dict[str, Any]:
    """Return the settings with absolute paths, so that equal studies have equal forms."""
    shown: dict[str, Any] = json.loads(settings.model_dump_json())
    shown["output"] = str(settings.output_folder)
    shown["storage"] = settings.storage and without_password(settings.storage_url)
    shown["tracking"]["uri"] = settings.tracking.uri and without_password(settings.tracking_uri)
    shown["model"]["id"] = settings.model_id
    if settings.data.source == "files":
        for split in ("train", "validation", "test"):
            shown["data"][split] = str(settings.folder / Path(getattr(settings.data, split)).expanduser())
    if settings.forgetting is not None and settings.forgetting.file is not None:
        shown["forgetting"]["file"] = str(settings.folder / Path(settings.forgetting.file).expanduser())
    for own in (each for each in (shown["metrics"] or {}).values() if isinstance(each, dict) and each["folder"]):
        own["folder"] = str(settings.folder / Path(own["folder"]).expanduser())
    return shown


@contextmanager
def _arguments_named() -> Iterator[None]:
    try:
        yield
    except StudyFileError as error:
        raise StudyFileError(in_argument_terms(problem) for problem in error.problems) from None
