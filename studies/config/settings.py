"""The sections of a study file. Their descriptions become the JSON schema.

Checks across sections (registered names, settings that do not go together) are in `checks.py`.
"""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    Tag,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from autopeft.search_space.backbones.backbone import MOST_LAYERS
from autopeft.search_space.declaration import Granularity, Variation
from autopeft.search_space.domains import MOST
from autopeft.search_space.problem import Goal, SurrogateKind
from autopeft.search_space.spelling import did_you_mean
from autopeft.search_space.training import Training

Positive = Annotated[float, Field(gt=0)]
#: A number of trials, runs or members.
Count = Annotated[int, Field(ge=1, le=MOST)]
#: Minutes or seconds.
Duration = Annotated[float, Field(gt=0, le=1e9)]
#: Adapters, groups or metrics by name, and members of a group.
MOST_NAMED = 100
#: Names become parts of the names of genes, where dots are separators.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


def _known_task(name: str) -> str:
    from autopeft.evaluators.tasks import TASKS

    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{did_you_mean(name, TASKS)}")
    return name


#: A registered task.
TaskName = Annotated[str, AfterValidator(_known_task)]


class Section(BaseModel):
    """Base of the sections: strict types and no unknown keys."""

    # Strict: a trial count of "40" or of 40.5 is a mistake, not a number to convert.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Range(Section):
    """Every number from low to high."""

    # Both types keep whole numbers whole; float comes first, so that a message about a wrong type says "a number".
    low: float | int = Field(description="smallest value")
    high: float | int = Field(description="largest value")
    log: bool = Field(default=False, description="spread over orders of magnitude")
    step: int | None = Field(default=None, ge=1, description="distance between whole numbers")


def _scalar(value: Any) -> Any:
    if not isinstance(value, (bool, int, float, str)) or (isinstance(value, float) and not isfinite(value)):
        raise ValueError("must be a number, a word, true or false")
    return value


def _shape(value: Any) -> str:
    if isinstance(value, (dict, Range)):
        return "Range"
    return "list" if isinstance(value, (list, tuple)) else "value"


Scalar = Annotated[Any, AfterValidator(_scalar), WithJsonSchema({"type": ["number", "string", "boolean"]})]
#: A value (fixed), a list of values (choose one) or a range.
Setting = Annotated[
    Annotated[Range, Tag("Range")] | Annotated[tuple[Scalar, ...], Tag("list")] | Annotated[Scalar, Tag("value")],
    Discriminator(_shape),
]


class ModelSettings(Section):
    """The frozen transformer."""

    id: str = Field(
        default="embedded",
        min_length=1,
        description="embedded (a small English encoder), a folder, or a hub id",
    )
    revision: str | None = Field(default=None, description="commit or tag on the hub")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="type of its weights")
    modules: dict[str, str] | None = Field(
        default=None, description="paths of its modules by role, for a model family that is not recognised"
    )


class DataSettings(Section):
    """Rows for training, selection and test. Only finalists are scored on the test rows."""

    source: str = Field(
        default="embedded",
        min_length=1,
        description="embedded (topics of docstrings), embedded-domains (four kinds of text with a question each),"
        " files, or the id of a hub dataset",
    )
    revision: str | None = Field(default=None, description="commit or tag on the hub")
    train: str | None = Field(default=None, description="file (.jsonl, .csv, .parquet) or, on the hub, split")
    validation: str | None = Field(default=None, description="the same, for rows on which candidates are compared")
    test: str | None = Field(default=None, description="the same, for the final front")
    text: str = Field(default="text", description="column of the text")
    text_pair: str | None = Field(
        default=None,
        min_length=1,
        description="column of a second text that is read together with the first, for pairs; null: none",
    )
    label: str = Field(default="label", description="column of the class")
    labels: str | None = Field(
        default=None,
        min_length=1,
        description="column of a list with any number of classes, in place of label; null: each row has one class",
    )
    domain: str | None = Field(
        default=None,
        min_length=1,
        description="column with the data set or task of a row; null: none, except that embedded-domains has its own",
    )
    prompt: str = Field(default="prompt", description="column of the prompt (causal-lm)")
    completion: str = Field(default="completion", description="column of the text to learn (causal-lm)")
    max_length: Count = Field(default=64, description="largest number of tokens per row; longer rows are cut")
    max_train_rows: int | None = Field(
        default=None,
        ge=1,
        description="size of a fixed random training subset with every label and domain; null: all rows",
    )

    @model_serializer(mode="wrap")
    def _serialize(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out later additions that are not set, so that older studies, scores and recipes keep their keys."""
        return {name: value for name, value in default(self).items() if name not in _LATER or value is not None}


#: Settings that were added after the first version of the file.
_LATER = ("domain", "text_pair", "labels")


class AdapterSettings(Section):
    """One adapter type in the space. It takes the fields of its kind as well, each a value, list or range."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Setting] = Field(init=False)

    kind: str | None = Field(default=None, description="adapter type; default: the name of this entry")
    at: tuple[str, ...] = Field(default=(), description="roles of its possible sites; default: those of the type")
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description="restrict it to these layers"
    )
    placement: Granularity | None = Field(
        default=None, description="search for the places where it is on, at this granularity; null: always on"
    )
    vary: dict[str, Variation] = Field(
        default={},
        description="granularity of fields that are chosen per stage, layer or site; the rank of LoRAs also per expert",
    )
    given: tuple[str, ...] = Field(
        default=(), description="folders of pretrained LoRAs in peft's format, which become frozen experts"
    )
    router_per: Literal["site", "layer"] = Field(
        default="site", description="for mixtures: one router per site, or one that all sites of a layer share"
    )

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of its kind that the file sets."""
        return self.__pydantic_extra__ or {}


class OneOfSettings(Section):
    """Exactly one of these adapters is present."""

    members: tuple[str, ...] = Field(min_length=1, max_length=MOST_NAMED, description="names of adapters of this space")
    per: Granularity = Field(default="model", description="how often the choice is made")
    optional: bool = Field(default=False, description="allow that none of them is present")


class SpaceSettings(Section):
    """Adapters with their possible sizes and places. A preset can be combined with your own adapters."""

    preset: str | None = Field(default=None, description="a published space to start from")
    adapters: dict[Name, AdapterSettings] = Field(default={}, max_length=MOST_NAMED, description="adapters by name")
    one_of: dict[Name, OneOfSettings] = Field(
        default={}, max_length=MOST_NAMED, description="groups that exclude each other, by name"
    )
    layer_gate: bool | None = Field(default=None, description="one on/off bit per layer that all adapters share")
    stages: int | None = Field(
        default=None,
        ge=1,
        le=MOST_LAYERS,
        description="number of equal groups of layers for the granularity stage; default: as in the preset, or 4",
    )


#: The default evaluator, which supports every setting.
PACKED = "packed"
_DEFAULTS = Training()


class TrainingSettings(Section):
    """How each candidate is trained. Search the learning rate: the best one depends on the adapter's size."""

    learning_rate: Setting = Field(
        default=Range(low=5e-4, high=1e-2, log=True), description="peak learning rate of AdamW"
    )
    weight_decay: Setting = Field(default=_DEFAULTS.weight_decay, description="decoupled weight decay")
    epochs: Setting = Field(default=_DEFAULTS.epochs, description="passes over the training rows")
    batch_size: Setting = Field(default=_DEFAULTS.batch_size, description="rows per step")
    warmup: Setting = Field(default=_DEFAULTS.warmup, description="share of the steps with a rising learning rate")
    schedule: Setting = Field(default=_DEFAULTS.schedule, description="linear, cosine or constant")
    max_grad_norm: Setting = Field(default=_DEFAULTS.max_grad_norm, description="clip of the gradient norm; 0: none")


class ObjectiveSettings(Section):
    """An objective: a mapping, or just the name of a metric."""

    name: str = Field(description="a metric")
    bound: float | None = Field(default=None, description="worst acceptable value")
    reference: float | None = Field(
        default=None, description="reference value for the hypervolume; default: from the trials"
    )
    direction: Literal["maximise", "minimise"] | None = Field(default=None, description="default: the metric's own")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class ConstraintSettings(Section):
    """Upper limits. A candidate that exceeds a limit is rejected before its training."""

    num_params: Positive | None = Field(default=None, description="trainable parameters, without the head")
    trainable_fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="the same as a share of the model's parameters"
    )
    stored_bytes: Positive | None = Field(default=None, description="size of the adapters on disk")
    flops_per_token: Positive | None = Field(default=None, description="operations added per token")
    latency_s: Positive | None = Field(default=None, description="seconds of a forward pass, unmerged")
    peak_memory_bytes: Positive | None = Field(default=None, description="memory of a training step")


Share = Annotated[float, Field(gt=0, le=1)]


def _start_shape(value: Any) -> str:
    return "settings" if isinstance(value, dict) else "name"


#: The name of a baseline, or values by setting: ``{lora.rank: 8, training.learning_rate: 0.01}``.
Start = Annotated[
    Annotated[dict[str, Scalar], Tag("settings")] | Annotated[str, Tag("name")], Discriminator(_start_shape)
]


class SearchSettings(Section):
    """The search."""

    searcher: str = Field(default="bo", description="algorithm that proposes the candidates")
    trials: Count = Field(default=40, description="number of candidates to evaluate")
    goal: Goal | None = Field(
        default=None,
        description="cheapest_as_good: the cheapest candidate within recommend.within of the best, for the searcher bo;"
        " front: all trade-offs; null: cheapest_as_good for one quality and one cost as objectives, else front",
    )
    share: Share = Field(default=1.0, description="share of the training steps for each candidate")
    rungs: tuple[Share, ...] = Field(
        default=(), description="ascending shares of the steps at which the loss on held-out examples is measured"
    )
    keep: Share | Literal["auto"] = Field(
        default=1.0,
        description="share of a batch that continues after each rung, by ranks of loss and costs; 1: all; auto: those"
        " that may still be the best or the cheapest as good, compared with all trials so far",
    )
    batch: Count = Field(
        default=8, description="number of candidates that are proposed together and compared at the rungs"
    )
    initial: Count | None = Field(
        default=None,
        description="number of space-filling points before the searcher uses its model; null: the searcher's default",
    )
    surrogate: SurrogateKind | None = Field(
        default=None,
        description="smooth: every gene may matter a little; sparse: few genes matter; null: the searcher's choice",
    )
    start: tuple[Start, ...] = Field(
        default=(),
        description="configurations to evaluate first: baselines by name, or values such as {lora.rank: 8}",
    )
    prior: str | None = Field(
        default=None,
        min_length=1,
        description="file or folder of an earlier study on a related task, whose trials guide the first proposals",
    )
    timeout_s: Duration | None = Field(default=None, description="time limit in seconds")


class ProxySettings(Section):
    """How the searcher `proxy` scores candidates before it trains any of them."""

    score: str = Field(
        default="supernet",
        description="supernet: held-out loss with shared weights; gates: trained gates; or an untrained proxy",
    )
    subnets: Count = Field(default=2000, description="candidates to score")
    search: str = Field(default="evolution", description="searcher that proposes the candidates to score")
    policy: str = Field(default="fair", description="selection of the subnets that train in each step")
    epochs: Annotated[float, Field(gt=0, le=MOST)] | None = Field(
        default=None,
        description="passes over the training rows to train the proxy itself; null: as for a candidate",
    )
    distil: bool = Field(default=False, description="distil from the largest subnet to the others in each step")
    filter: str | None = Field(
        default=None, description="untrained proxy that selects the subnets to train; null: all subnets"
    )


class EvaluationSettings(Section):
    """How candidates are trained. It changes the duration of a study but not its results, except for rounding."""

    evaluator: str = Field(
        default=PACKED,
        description="packed: several candidates side by side on one backbone; train: one after the other",
    )
    pack: Count | None = Field(default=None, description="candidates per pack; null: as many as fit into the memory")
    cache_bytes: int = Field(
        default=10**9, ge=0, description="memory to cache the outputs of the layers below all adapters; 0: no cache"
    )
    cache_folder: str | None = Field(default=None, description="folder to cache them on disk across studies")
    cache_folder_bytes: int = Field(
        default=10**10, ge=0, description="size limit of this folder; the least recently used go first"
    )


class BaselineSettings(Section):
    """Baselines for comparison with the front, each tuned over the learning rate."""

    names: tuple[str, ...] = Field(default=("head", "lora-r8-qv", "full"), description="baselines to train")
    learning_rates: tuple[Positive, ...] = Field(
        default=(5e-4, 2e-3, 5e-3), min_length=1, description="learning rates to try for each"
    )
    full_learning_rates: tuple[Positive, ...] = Field(
        default=(5e-5, 2e-4), min_length=1, description="learning rates to try for full fine-tuning"
    )


class FinalistSettings(Section):
    """Members of the front that are trained again with several seeds, for error bars."""

    seeds: Count = Field(
        default=3,
        description="seeds per finalist on average; each gets half of them, rounded up, and at least 2 of 2 or more;"
        " the other runs go to the finalists that decide the recommendation",
    )
    most: Count = Field(default=6, description="largest number of finalists")
    controls: bool = Field(default=True, description="also train the matched baselines of mixtures of experts")


class RecommendSettings(Section):
    """Which member of the front is recommended: the cheapest one whose quality is shown to be as good as the best."""

    within: Positive | None = Field(
        default=None,
        description="loss of quality that counts as none, in the unit of the first quality among the objectives;"
        " null: 0.01 (a point) of a share such as accuracy, 1 % of the best value of other metrics",
    )


class TrackingSettings(Section):
    """Tracking by MLflow."""

    enabled: bool = Field(default=True, description="log the study to MLflow")
    uri: str | None = Field(
        default=None,
        min_length=1,
        description="URI of an MLflow server, database or folder, paths relative to this file;"
        " default: mlflow.db in the output folder",
    )
    experiment: str | None = Field(default=None, description="MLflow experiment; default: the name of the study")
