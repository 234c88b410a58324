"""The recipe: a configuration from a study, with everything to train it again and its promises, in readable YAML.

The file has all data needed to rebuild the network, including module paths, so that a recipe loads without the settings
`model.modules` of its study.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from autopeft.evaluators.atomic import atomic_write
from autopeft.search_space.adapters import AdapterSpec, spec_from_dict
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.metrics import MetricsByName
from autopeft.search_space.problem import METRICS
from autopeft.search_space.spelling import did_you_mean
from autopeft.search_space.training import Training
from autopeft.studies.config.checks import unknown_key
from autopeft.studies.config.sections.forgetting import ForgettingSettings
from autopeft.studies.config.sections.inputs import TaskName
from autopeft.studies.config.source import Source, StudyFileError, read
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.recipes.parts import (
    Averaged,
    Comparison,
    Contents,
    Dtype,
    Measured,
    OwnMetric,
    OwnTask,
    Part,
    Provenance,
    RecipeBackbone,
    RecipeData,
    RecipeGeneration,
)
from autopeft.studies.versions import newer

if TYPE_CHECKING:
    from autopeft.evaluators.tasks import Task

#: Version 2 has `contents`.
SCHEMA_VERSION: Literal[2] = 2
#: Fields that were added to version 1, and are left out if they are empty.
LATER = ("metrics", "generation", "forgetting", "compared", "contents")

#: Keys and values of a recipe, which has a dozen for each site and adapter of a model of any depth.
MOST_VALUES = 200_000

_HEADER = """\
autopeft recipe. `autopeft train` trains it, `autopeft verify` trains it again and checks what it promises,
`autopeft export` writes it in the formats of other tools.
"""
_COMMENTS = {
    "backbone": "the frozen transformer",
    "architecture": "adapters by site",
    "sites": "where those sites, and the linears of the task head, are in the model",
    "training": "AdamW; warmup is a share of the steps",
    "metrics": "code of the study's user that `autopeft train` and `verify` run with --trust-code alone",
    "generation": "greedy texts after the prompts, which the metrics of texts read",
    "forgetting": "retained rows, on which `train` and `verify` measure forgetting; a file is relative to data.folder",
    "measured": "low and high: where one more training run with another seed is promised to end",
    "compared": "the front of the study: means over fresh seeds, and the difference to its best member",
    "contents": "digests of what the study read: `train` and `verify` refuse other rows and another model",
    "averaged": "validation scores with all experts of every mixture weighted alike after the training",
}


class RecipeError(ConfigurationError):
    """All problems of a recipe, one line each: `file:line key: message`."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def _spec(value: Any) -> AdapterSpec:
    if isinstance(value, AdapterSpec):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("an adapter must be a mapping with its kind and its fields")
    return spec_from_dict(dict(value))


def _declared(cls: type) -> Any:
    """Return a validator that builds the dataclass `cls` from a mapping and reports unknown fields."""

    def build(value: Any) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError("must be a mapping")
        known = [field.name for field in fields(cls)]
        unknown = [f"unknown key {name!r}{did_you_mean(str(name), known)}" for name in value if name not in known]
        if unknown:
            raise ValueError("; ".join(unknown))
        try:
            return cls(**value)
        except TypeError as error:
            raise ValueError(str(error)) from None

    return PlainValidator(build)


def _without_defaults(site: Site) -> dict[str, Any]:
    return {f.name: getattr(site, f.name) for f in fields(Site) if getattr(site, f.name) != f.default}


Spec = Annotated[AdapterSpec, PlainValidator(_spec), PlainSerializer(lambda spec: spec.to_dict())]


def _is_task(value: Any) -> bool:
    return isinstance(value, OwnTask) or (isinstance(value, Mapping) and "lm_eval" in value)


Own = Annotated[
    Annotated[OwnMetric, Tag("OwnMetric")] | Annotated[OwnTask, Tag("OwnTask")],
    Discriminator(lambda value: "OwnTask" if _is_task(value) else "OwnMetric"),
]


class Recipe(Part):
    """A configuration with everything to rebuild, train and verify it."""

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    backbone: RecipeBackbone
    task: TaskName
    labels: tuple[str, ...] | None = None
    domains: tuple[str, ...] | None = None
    architecture: dict[str, tuple[Spec, ...]]
    sites: dict[str, Annotated[Site, _declared(Site), PlainSerializer(_without_defaults)]]
    head_modules: tuple[str, ...] = ()
    training: Annotated[Training, _declared(Training), PlainSerializer(asdict)]
    data: RecipeData
    seed: int = 0
    metrics: dict[str, Own] = Field(default_factory=dict)
    generation: RecipeGeneration | None = None
    forgetting: ForgettingSettings | None = None
    measured: dict[str, Measured] = Field(default_factory=dict)
    averaged: dict[str, Averaged] = Field(default_factory=dict)
    compared: Comparison | None = None
    contents: Contents | None = None
    provenance: Provenance

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        problems = []
        for name, spec in ((name, spec) for name, specs in self.architecture.items() for spec in specs):
            site = self.sites.get(name)
            if site is None:
                problems.append(f"architecture: {name} is not among the sites{did_you_mean(name, self.sites)}")
            elif site.role not in spec.roles or not spec.fits(site):
                problems.append(f"architecture: {name} {spec.kind}: cannot be attached to this site ({site.role})")
        if problems:
            raise ValueError("; ".join(problems))
        if self.task_class.has_labels and not self.labels:
            raise ValueError(f"a {self.task} recipe needs `labels`")
        known = self.metrics_by_name()
        for name, measured in self.measured.items():
            if measured.low is not None and name not in known:
                raise ValueError(f"measured: unknown metric {name!r}{did_you_mean(name, known)}")
        return self

    @model_serializer(mode="wrap")
    def _serialize(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out empty later additions, so that older recipes stay equal."""
        return {name: value for name, value in default(self).items() if name not in LATER or value}

    def maximises(self, name: str) -> bool:
        """Return whether more of a metric is better. Raises KeyError for an unknown metric, and MetricError."""
        return self.metrics_by_name()[name].maximise

    def metrics_by_name(self) -> MetricsByName:
        """Return all metrics that the recipe may name, its own ones without their code. Raises MetricError."""
        return METRICS.with_own({name: metric.declared(name) for name, metric in self.metrics.items()})

    @classmethod
    def of(
        cls,
        *,
        backbone: Backbone,
        candidate: Candidate,
        head_sites: Sequence[Site],
        dtype: Dtype = "float32",
        **rest: Any,
    ) -> Recipe:
        """Build the recipe of a candidate. `rest`: the other fields. Raises ValueError, mostly from pydantic."""
        chosen = dict(candidate.architecture.adapters)
        # The backbone's order is the order of the layers and of the attachment.
        used = [site for site in backbone.sites if site.name in chosen]
        names = ("id", "revision", "family", "hidden_size", "num_layers", "num_params", "causal", "quantization")
        return cls(
            backbone=RecipeBackbone(dtype=dtype, **{name: getattr(backbone, name) for name in names}),
            architecture={site.name: chosen[site.name] for site in used},
            sites={site.name: site for site in (*used, *head_sites)},
            head_modules=backbone.head_modules,
            training=Training(**candidate.training),
            **rest,
        )

    @property
    def task_class(self) -> type[Task]:
        """The class of the task, in the variant for the data settings."""
        from autopeft.evaluators.tasks import TASKS

        return TASKS[self.task].for_data(self.data.for_loading())

    @property
    def adapters(self) -> Architecture:
        """The architecture."""
        return Architecture.of(self.architecture)

    @property
    def candidate(self) -> Candidate:
        """The architecture with its training settings."""
        return Candidate(architecture=self.adapters, training=asdict(self.training))

    @property
    def head_sites(self) -> tuple[Site, ...]:
        """The linears of the task head."""
        return tuple(site for site in self.sites.values() if site.role == "head")

    @property
    def host(self) -> Backbone:
        """The backbone with only the adapted sites, which are sufficient to attach the adapters."""
        heads = self.head_sites
        return Backbone(
            **self.backbone.model_dump(exclude={"dtype"}),
            sites=tuple(site for site in self.sites.values() if site.role != "head"),
            head_modules=self.head_modules,
            num_head_params=sum(site.out_features * (site.in_features + site.bias) for site in heads),
        )

    @property
    def num_adapter_params(self) -> int:
        """Trainable parameters without the head."""
        return self.adapters.num_params(self.host)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON-compatible data."""
        return self.model_dump(mode="json")

    def save(self, path: str | Path) -> None:
        """Write the recipe atomically. Raises OSError."""
        path = Path(path)
        data = CommentedMap(self.to_dict())
        data.yaml_set_start_comment(_HEADER)
        for key, comment in _COMMENTS.items():
            if key not in data:
                continue
            data.yaml_set_comment_before_after_key(key, before=f"\n{comment}")
        # One line per site and per adapter, however many fields they have.
        data["sites"] = {name: _one_line(site) for name, site in data["sites"].items()}
        data["architecture"] = {
            name: [_one_line(spec) for spec in specs] for name, specs in data["architecture"].items()
        }
        yaml = YAML()
        yaml.width = 1000
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            yaml.dump(data, file)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe. Raises RecipeError with all problems."""
        path = Path(path)
        if not path.is_file():
            raise RecipeError([f"{path}: no such file"])
        try:
            source = read(path, (), {}, MOST_VALUES)
        except StudyFileError as error:
            raise RecipeError(error.problems) from None
        version = source.data.get("schema_version", SCHEMA_VERSION)
        if isinstance(version, int) and version > SCHEMA_VERSION:
            what = newer(f"the recipe has version {version}, this autopeft reads up to {SCHEMA_VERSION}")
            raise RecipeError([source.render(("schema_version",), what)])
        try:
            return cls.model_validate(source.data)
        except ValidationError as error:
            raise RecipeError([_problem(source, details) for details in error.errors()]) from None


_SECTIONS: dict[str, type[BaseModel]] = {
    "backbone": RecipeBackbone,
    "data": RecipeData,
    "metrics": OwnMetric,
    "generation": RecipeGeneration,
    "forgetting": ForgettingSettings,
    "measured": Measured,
    "averaged": Averaged,
    "compared": Comparison,
    "contents": Contents,
    "provenance": Provenance,
}


def _one_line(mapping: Mapping[str, Any]) -> CommentedMap:
    flow = CommentedMap(mapping)
    flow.fa.set_flow_style()
    return flow


def _problem(source: Source, details: ErrorDetails) -> str:
    location = details["loc"]
    what = details["msg"].removeprefix("Value error, ")
    own_task = location[:1] == ("metrics",) and location[2:3] == ("OwnTask",)
    if location[:1] == ("metrics",):  # without the name of the member of the union
        location = (*location[:2], *location[3:])
    if details["type"] == "extra_forbidden":
        section = _SECTIONS[str(location[0])] if len(location) > 1 else Recipe
        section = OwnTask if own_task else section
        what = unknown_key(str(location[-1]), section.model_fields)
    elif details["type"] == "missing":
        what = "is missing"
    return source.render(location, what) if location else f"{source.name}: {what}"
