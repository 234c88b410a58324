"""The settings of one study as data; `loading.py` reads and checks them, `problem.py` builds the problem."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, PrivateAttr, Tag, model_validator

from autopeft.search_space.metrics import ALWAYS, SEPARATOR, MetricsByName, Quality, UserDefined, user_defined
from autopeft.search_space.problem import COSTS, METRICS, Goal, Objective
from autopeft.studies.config.sections.base import MOST_NAMED, Duration, GrowingSection, Name
from autopeft.studies.config.sections.forgetting import ForgettingSettings
from autopeft.studies.config.sections.inputs import DataSettings, ModelSettings, TaskName
from autopeft.studies.config.sections.lm_eval import LmEvalSettings
from autopeft.studies.config.sections.results import RecommendSettings, TrackingSettings
from autopeft.studies.config.sections.search import (
    BaselineSettings,
    ConstraintSettings,
    FinalistSettings,
    MetricSettings,
    ObjectiveSettings,
    ProxySettings,
    ReportedSettings,
    SearchSettings,
)
from autopeft.studies.config.sections.space import SpaceSettings
from autopeft.studies.config.sections.training import EvaluationSettings, GenerationSettings, TrainingSettings
from autopeft.studies.config.source import Keys, Source
from autopeft.studies.urls import located, without_password

if TYPE_CHECKING:
    from autopeft.evaluators.rows import DataConfig
    from autopeft.evaluators.tasks import Task

FILE_NAME = "study.yaml"
#: The ledger in the output folder, unless the study has a storage of its own.
LEDGER = "ledger.db"
#: A module:function, or a task of lm-eval.
OwnSettings = Annotated[
    Annotated[str, Tag("str")] | Annotated[LmEvalSettings, Tag("LmEvalSettings")],
    Discriminator(lambda value: "LmEvalSettings" if isinstance(value, (dict, LmEvalSettings)) else "str"),
]


class StudyFile(GrowingSection):
    """The settings of one study."""

    later: ClassVar = {"generation": (None,), "report": (None,), "forgetting": (None,)}

    study: Name = Field(description="name of the study: letters, digits, - and _")
    seed: int = Field(default=0, ge=0, lt=2**31, description="random seed; the same seed gives the same study")
    task: TaskName = Field(default="classification", description="learning task")
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    space: SpaceSettings = SpaceSettings()
    training: TrainingSettings = TrainingSettings()
    objectives: Annotated[tuple[ObjectiveSettings, ...], Field(min_length=2, max_length=4)] = Field(
        default=(ObjectiveSettings(name="accuracy"), ObjectiveSettings(name="num_params")),
        description="two to four metrics that span the front",
    )
    report: Annotated[tuple[ReportedSettings, ...], Field(max_length=MOST_NAMED)] | None = Field(
        default=None,
        description="further metrics that every candidate is measured by, in all tables; with a bound, candidates"
        " beyond it are not feasible",
    )
    metrics: dict[Name, OwnSettings] | None = Field(
        default=None,
        max_length=MOST_NAMED,
        description="your own metrics by name, each a module:function in a module next to this file; of targets and"
        " predictions, or for causal-lm of prompts, generated texts and references; or a task of lm-eval:"
        " {lm_eval: name, folder: ...}",
    )
    generation: GenerationSettings | None = Field(
        default=None, description="the texts that metrics of generated text read (causal-lm); null: the defaults"
    )
    forgetting: ForgettingSettings | None = Field(
        default=None, description="rows that a model should not forget, for the objective forgetting; null: none"
    )
    constraints: ConstraintSettings = ConstraintSettings()
    search: SearchSettings = SearchSettings()
    proxy: ProxySettings = ProxySettings()
    baselines: BaselineSettings = BaselineSettings()
    finalists: FinalistSettings = FinalistSettings()
    recommend: RecommendSettings = RecommendSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    tracking: TrackingSettings = TrackingSettings()
    minutes: Duration | None = Field(
        default=None,
        description="time for the whole study on this machine: decides search.trials, batch, rungs and keep,"
        " finalists.seeds and most where this file leaves them out, and ends the search in time for the finalists;"
        " null: no limit",
    )
    output: str | None = Field(
        default=None, description="folder of all results; default: runs/<study> beside this file"
    )
    storage: str | None = Field(
        default=None,
        min_length=1,
        description="Optuna storage URL, an SQLite path relative to this file;"
        " default: a database in the output folder",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where to train; auto: a GPU if there is one"
    )

    _source: Source = PrivateAttr(default_factory=lambda: Source("", {}))
    _file: Path = PrivateAttr(default_factory=lambda: Path.cwd() / FILE_NAME)
    _overrides: tuple[str, ...] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _with_turns(self) -> Self:
        """Say which turns are learnt, so that ledgers and recipes have it; the key stays one that the file lacks."""
        from autopeft.evaluators.tasks import TASKS

        if TASKS[self.task].has_turns and self.data.train_on_turns is None:
            fields_set = self.data.model_fields_set
            data = DataSettings.model_construct(fields_set, **{**dict(self.data), "train_on_turns": "all"})
            object.__setattr__(self, "data", data)
        return self

    @property
    def path(self) -> Path:
        """The file, as the user named it."""
        return self._file

    @property
    def words(self) -> str:
        """The study on a command line: its file, and the `--set` options that it was loaded with, without passwords."""
        options = [word for each in self._overrides for word in ("--set", without_password(each))]
        return shlex.join([str(self.path), *options])

    @property
    def folder(self) -> Path:
        """The folder of the file, absolute: relative paths count from here."""
        return self._file.resolve().parent

    @property
    def output_folder(self) -> Path:
        """The folder of all results, absolute."""
        return Path(os.path.normpath(self.folder / Path(self.output or f"runs/{self.study}").expanduser()))

    @property
    def storage_url(self) -> str:
        """The Optuna storage of the ledger."""
        return located(self.storage, self.folder) if self.storage else f"sqlite:///{self.output_folder / LEDGER}"

    @property
    def tracking_uri(self) -> str:
        """The URI of the MLflow server or database."""
        uri = self.tracking.uri
        return located(uri, self.folder) if uri else f"sqlite:///{self.output_folder / 'mlflow.db'}"

    @property
    def model_id(self) -> str:
        """`model.id`; a folder or a GGUF file relative to the study file becomes absolute."""
        beside = self.folder / Path(self.model.id).expanduser()
        is_file = beside.suffix.lower() == ".gguf" and os.path.isfile(beside)
        local = is_file or os.path.isdir(beside) or self.model.id.startswith((".", "~"))
        return str(beside) if local else self.model.id

    def data_settings(self) -> DataConfig:
        """Return the argument of `load_splits`; splits on the hub have their usual names by default."""
        from autopeft.evaluators.rows import DataConfig

        set_here = {key: value for key, value in dict(self.data).items() if value is not None}
        return DataConfig(**set_here, folder=self.folder)

    @property
    def task_class(self) -> type[Task]:
        """The class of the task, in the variant for the data settings."""
        from autopeft.evaluators.tasks import TASKS

        return TASKS[self.task].for_data(self.data_settings())

    @property
    def named_metrics(self) -> list[tuple[Keys, MetricSettings]]:
        """The objectives and what is only reported, with their places in the file."""
        objectives: list[tuple[Keys, MetricSettings]] = [(("objectives", i), o) for i, o in enumerate(self.objectives)]
        return [*objectives, *((("report", i), found) for i, found in enumerate(self.report or ()))]

    def own_metrics(self) -> dict[str, UserDefined]:
        """Return the study's own metrics by name, without loading their code. Raises MetricError.

        More is better unless an objective or what is reported has the direction minimise.
        """
        return {name: self.own_metric(name) for name in self.metrics or ()}

    def own_metric(self, name: str) -> UserDefined:
        """Return one of `own_metrics`. Raises MetricError."""
        assert self.metrics is not None
        same = (m for _, m in self.named_metrics if m.name.partition(SEPARATOR)[0] == name)
        maximise = all(m.direction != "minimise" for m in same)
        given = self.metrics[name]
        if isinstance(given, LmEvalSettings):
            return given.metric_of(name, maximise)
        return user_defined(name, given, maximise, self.task_class.generates)

    @property
    def greedy(self) -> GenerationSettings:
        """The settings of generated texts, `generation` or its defaults."""
        return self.generation or GenerationSettings()

    def qualities(self) -> tuple[Quality, ...]:
        """Return the quality metrics of every candidate, with the code of own metrics loaded. Raises MetricError."""
        own = {name: metric.loaded(self.folder) for name, metric in self.own_metrics().items()}
        named = self.metrics_by_name(own).qualities(metric.name for _, metric in self.named_metrics)
        wanted = [metric for metric in named if not isinstance(metric, UserDefined)]
        return tuple(dict.fromkeys((*ALWAYS, *wanted, *own.values())))

    def metrics_by_name(self, own: Mapping[str, UserDefined]) -> MetricsByName:
        """Return all metrics that the study may name. `own`: its own ones."""
        return METRICS.with_own(own, self.greedy.pattern)

    def objectives_list(self) -> tuple[Objective, ...]:
        """Return the objectives. Raises MetricError."""
        return tuple(self._objective(o, reference=o.reference) for o in self.objectives)

    def reported_list(self) -> tuple[Objective, ...]:
        """Return what is only reported. Raises MetricError."""
        return tuple(self._objective(metric) for metric in self.report or ())

    def _objective(self, named: MetricSettings, **settings: Any) -> Objective:
        if named.direction is not None:
            settings["maximise"] = named.direction == "maximise"
        found = self.metrics_by_name(self.own_metrics()).get(named.name)
        own = found if isinstance(found, Quality) and named.name not in METRICS else None
        return Objective.of(named.name, bound=named.bound, own=own, **settings)

    @property
    def decides_trials(self) -> bool:
        """Whether the file, and not `minutes`, decides the number of trials."""
        return self.minutes is None or "trials" in self.search.model_fields_set

    @property
    def search_words(self) -> str:
        """The number of trials and the searcher, for people."""
        trials = (
            f"{self.search.trials} trials" if self.decides_trials else f"as many trials as {self.minutes:g} min allow"
        )
        return f"{trials} by {self.search.searcher}"

    @property
    def goal(self) -> Goal:
        """What the search looks for, `search.goal` or its default."""
        kinds = sorted("cost" if o.name in COSTS else "quality" for o in self.objectives)
        two = kinds == ["cost", "quality"] and not self.maximised_costs
        return self.search.goal or ("cheapest_as_good" if two else "front")

    @property
    def has_quality_and_cost(self) -> bool:
        """Whether a quality and a cost to minimise are among the objectives."""
        return len({o.name in COSTS for o in self.objectives if o.name not in self.maximised_costs}) == 2

    @property
    def maximised_costs(self) -> set[str]:
        """The costs among the objectives that the study maximises, against their usual direction."""
        return {o.name for o in self.objectives if o.name in COSTS and o.direction == "maximise"}

    def render(self, path: Keys, what: str) -> str:
        """Return the problem `what` of the setting at `path` as `file:line key: what`."""
        return self._source.render(path, what)

    def line(self, path: Keys) -> int:
        """Return the line of the setting at `path`."""
        return self._source.line(path)
