"""Search problems and their results: objectives, fidelities, measurements, trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.limits import Limits
from autopeft.search_space.metrics import QUALITIES, Metric, MetricsByName, Quality
from autopeft.search_space.metrics.base import MetricSource
from autopeft.search_space.spaces.genes import Assignment
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.search_space.spelling import did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Numbers = TypeVar("Numbers", float, "NDArray[np.float64]")

#: "pruned": stopped at a rung; the measurement has the values there.
TrialState = Literal["running", "complete", "pruned", "failed", "infeasible"]

#: What a search looks for. "front": all trade-offs between the objectives; "cheapest_as_good": the candidate with the
#: lowest first cost whose first quality is within the margin of the best one.
Goal = Literal["front", "cheapest_as_good"]

#: Prior of a surrogate model. "smooth": every gene may matter a little; "sparse": few genes matter.
SurrogateKind = Literal["smooth", "sparse"]


def _costs(*rows: tuple[str, str, MetricSource, str]) -> dict[str, Metric]:
    return {
        row[0]: Metric(name=row[0], unit=row[1], maximise=False, source=row[2], summary=row[3], bound=0.0)
        for row in rows
    }


COSTS: dict[str, Metric] = _costs(
    ("num_params", "parameters", "declared", "trainable parameters of the adapters, without the head"),
    ("stored_bytes", "bytes", "declared", "size of the trained adapters on disk"),
    ("flops_per_token", "operations", "declared", "what the adapters add to one forward pass"),
    ("peak_memory_bytes", "bytes", "measured", "high-water mark of one training step"),
    ("step_s", "seconds", "measured", "one training step"),
    ("latency_s", "seconds", "measured", "one forward pass of a batch, adapters unmerged"),
    ("merged_latency_s", "seconds", "measured", "one forward pass of a batch, mergeable adapters merged"),
)
#: Quality metrics of the registry, then costs, by name. A view: plug-ins load on demand.
METRICS = MetricsByName(COSTS, QUALITIES)
#: Costs that an architecture alone determines; each is a method of `Architecture`.
DECLARED = tuple(name for name, metric in COSTS.items() if metric.source == "declared")


def declared_costs(architecture: Architecture, backbone: Backbone) -> dict[str, float]:
    """Return the costs in `DECLARED` by name, in the units of their metrics."""
    return {name: getattr(architecture, name)(backbone) for name in DECLARED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A metric to optimise, or one that is only reported and may have a bound.

    `bound`: worst value that the user accepts. `reference`: value at the reference point of the hypervolume. Both
    are in the direction and unit of the metric. `own`: the metric, if the user defined it and `METRICS` lacks it.

    All code that uses an objective minimises; only `loss` and `value` apply the direction.
    """

    name: str
    maximise: bool
    unit: str = ""
    bound: float | None = None
    reference: float | None = None
    own: Quality | None = None

    @classmethod
    def of(cls, name: str, **settings: Any) -> Objective:
        """Return an objective over a metric of `METRICS` or over `own`, in the direction of the metric.

        Raises KeyError for an unknown name.
        """
        metric = settings.get("own") or METRICS[name]
        settings.setdefault("maximise", metric.maximise)
        return cls(name=name, unit=metric.unit, **settings)

    @property
    def metric(self) -> Metric:
        """The metric of this objective. Raises KeyError for an unknown name."""
        return self.own or METRICS[self.name]

    @property
    def is_quality(self) -> bool:
        """Whether the metric is measured on held-out rows after training, with a sampling error."""
        return isinstance(self.own or METRICS.get(self.name), Quality)

    @property
    def is_cost(self) -> bool:
        """Whether it is a cost to minimise."""
        return not self.is_quality and not self.maximise

    def loss(self, value: Numbers) -> Numbers:
        """Return `value` with its sign set so that lower is better."""
        return -value if self.maximise else value

    def value(self, loss: float) -> float:
        """Return the inverse of `loss`."""
        return -loss if self.maximise else loss

    def violation(self, value: float) -> float:
        """Return the excess of `value` over the bound, relative to the bound as in `Limits`; <= 0 is feasible."""
        if self.bound is None:
            return -1.0
        return (self.loss(value) - self.loss(self.bound)) / (abs(self.bound) or 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPoint:
    """A point and its proxy score, lower is better. `costs`: predicted costs by metric, where a prediction exists."""

    genes: Assignment
    score: float
    costs: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A search space, its objectives, and the budget in evaluations.

    Prior knowledge for searchers that can use it: `limits` reject candidates before training; `start`, points to
    evaluate first; `initial`, number of space-filling points before the surrogate model proposes (None: the searcher's
    default); `observed`, trials of this study that no searcher suggested, with genes of this space; `prior`, such
    trials of a related study; `surrogate`, the kind of model (None: the searcher's choice); `scored`, points with
    proxy scores.

    `reported`: further metrics that candidates are measured by; those with a bound are constraints. `within`: the loss
    of quality that counts as none, in the unit of the metric; None: `Metric.default_margin`. Raises ValueError for the
    goal "cheapest_as_good" without a quality, or without a cost to minimise, among the objectives.
    """

    space: SearchSpace
    objectives: tuple[Objective, ...]
    num_trials: int
    limits: Limits = field(default_factory=lambda: Limits({}))
    initial: int | None = None
    start: tuple[Assignment, ...] = ()
    observed: tuple[Trial, ...] = ()
    prior: tuple[Trial, ...] = ()
    surrogate: SurrogateKind | None = None
    scored: tuple[ScoredPoint, ...] = ()
    goal: Goal = "front"
    within: float | None = None
    reported: tuple[Objective, ...] = ()

    def __post_init__(self) -> None:
        if self.goal == "cheapest_as_good" and not self.has_quality_and_cost:
            raise ValueError('the goal "cheapest_as_good" needs a quality and a cost to minimise among the objectives')

    @property
    def measures(self) -> tuple[Objective, ...]:
        """The objectives, and what is only reported."""
        return (*self.objectives, *self.reported)

    @property
    def has_quality_and_cost(self) -> bool:
        """Whether a quality and a cost to minimise are among the objectives."""
        return any(o.is_quality for o in self.objectives) and any(o.is_cost for o in self.objectives)

    def first(self, *, quality: bool) -> int:
        """Return the index of the first quality, or of the first cost to minimise. Raises StopIteration."""
        return next(i for i, o in enumerate(self.objectives) if (o.is_quality if quality else o.is_cost))

    def margin(self, best: float) -> float:
        """Return the loss of the first quality that counts as none where its best value is `best`."""
        default = self.objectives[self.first(quality=True)].metric.default_margin(best)
        return default if self.within is None else self.within

    def violation(self, values: Mapping[str, float]) -> float:
        """Return the largest relative excess of `values` over the limits and bounds; <= 0 is feasible."""
        rejection = self.limits.rejection(values)
        bounds = (o.violation(values[o.name]) for o in self.measures if o.name in values)
        return max([rejection[0] if rejection else -1.0, *bounds])


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Share of the steps of the full training to run, in (0, 1]; the learning rate follows the full schedule.

    Raises ValueError for a share out of range.
    """

    share: float = 1.0
    #: Shares of the steps after which the candidate is validated during training, ascending.
    rungs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share must be in (0, 1], got {self.share}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Result of one evaluation: values by metric name, and standard errors where the sampling error is known."""

    values: Mapping[str, float]
    std_err: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    share: float = 1.0
    evaluator: str = ""
    wall_s: float = 0.0
    train_s: float = 0.0
    #: Mean training loss of each step.
    losses: tuple[float, ...] = ()
    #: Metrics at the rungs during training: share of the steps, then values by name.
    rungs: tuple[tuple[float, Mapping[str, float]], ...] = ()
    #: Quality metrics per validation example, in the order of the file, for paired comparisons. For a metric over the
    #: whole set: contributions whose mean is the metric.
    per_example: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    #: Quality on the test split; only finalists and baselines have it.
    test: Mapping[str, float] = field(default_factory=dict)
    test_per_example: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    #: Spread (interquartile range) of measured costs.
    spread: Mapping[str, float] = field(default_factory=dict)
    #: Routing statistics of mixtures on the validation split, by site; see `Routers.routes`.
    routes: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    #: Quality with equal weights for all experts of every mixture after training; only finalists have it.
    averaged: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able mapping that `from_dict` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """Return the measurement that `to_dict` wrote, also after a round trip through JSON."""
        data = dict(data)
        data["losses"] = tuple(data.get("losses", ()))
        for name in ("per_example", "test_per_example"):
            data[name] = {metric: tuple(column) for metric, column in data.get(name, {}).items()}
        data["rungs"] = tuple((share, values) for share, values in data.get("rungs", ()))
        return cls(**data)


RoleKind = Literal["search", "copy", "baseline", "finalist", "control"]


@dataclass(frozen=True, slots=True)
class Role:
    """The reason why a trial is in its study.

    "search": a searcher asked for it. "copy": it repeats another trial without an evaluation. "baseline": it trains the
    baseline `name`. "finalist": it trains the trial `of` with another seed. "control": it trains the trial `of` with
    the control `name` in place of its mixtures.
    """

    kind: RoleKind
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(RoleKind):
            raise ValueError(f"unknown role {self.kind!r}{did_you_mean(self.kind, get_args(RoleKind))}")
        if bool(self.name) != (self.kind in ("baseline", "control")):
            raise ValueError(f"only the roles baseline and control have a name, got {self.kind!r} with {self.name!r}")

    @classmethod
    def parse(cls, text: str) -> Role:
        """Return the role that `str` writes as `text`. Raises ValueError."""
        kind, _, name = text.partition(":")
        return cls(cast(RoleKind, kind), name)

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.name else self.kind

    @property
    def label(self) -> str:
        """The name of a baseline, which needs no further word; any other role in full."""
        return self.name if self.kind == "baseline" else str(self)


SEARCH, COPY, FINALIST = Role("search"), Role("copy"), Role("finalist")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One evaluation of one candidate, as the ledger stores it."""

    number: int
    role: Role
    candidate: Candidate
    #: Values of the active genes, by name; empty for baselines.
    genes: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    state: TrialState = "running"
    measurement: Measurement | None = None
    #: Why it failed, is infeasible or was pruned.
    error: str | None = None
    #: For a finalist or a control: the number of the trial that it belongs to.
    of: int | None = None
    #: State of the searcher (JSON), stored with the trial: a searcher restores itself from the trials alone.
    searcher_state: Mapping[str, Any] = field(default_factory=dict)
    #: Largest violation of a constraint or bound; <= 0 is feasible.
    violation: float = 0.0

    @property
    def values(self) -> Mapping[str, float]:
        """Metrics of a trial with a measurement, by name."""
        assert self.measurement is not None, f"trial {self.number} is {self.state}"
        return self.measurement.values
