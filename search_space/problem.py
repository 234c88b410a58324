"""What counts, and what was measured: objectives, fidelities, measurements, trials."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.limits import Limits
from autopeft.search_space.metrics import QUALITIES, Metric, Own
from autopeft.search_space.metrics.base import Source
from autopeft.search_space.spaces.genes import Assignment
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.search_space.spelling import did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Numbers = TypeVar("Numbers", float, "NDArray[np.float64]")

#: "pruned": ended at a rung; its measurement has the values there.
State = Literal["running", "complete", "pruned", "failed", "infeasible"]

#: "smooth": every gene may matter a little; "sparse": few genes matter.
Surrogate = Literal["smooth", "sparse"]


def _costs(*rows: tuple[str, str, Source, str]) -> dict[str, Metric]:
    return {row[0]: Metric(name=row[0], unit=row[1], maximise=False, source=row[2], summary=row[3]) for row in rows}


COSTS: dict[str, Metric] = _costs(
    ("num_params", "parameters", "declared", "trainable parameters of the adapters, without the head"),
    ("stored_bytes", "bytes", "declared", "size of the trained adapters on disk"),
    ("flops_per_token", "operations", "declared", "what the adapters add to one forward pass"),
    ("peak_memory_bytes", "bytes", "measured", "high-water mark of one training step"),
    ("step_s", "seconds", "measured", "one training step"),
    ("latency_s", "seconds", "measured", "one forward pass of a batch, adapters unmerged"),
    ("merged_latency_s", "seconds", "measured", "the same with what can be merged merged"),
)
#: The qualities of the registry, then the costs. A view: plug-ins are loaded when they are needed, not here.
METRICS: Mapping[str, Metric] = ChainMap(COSTS, cast("MutableMapping[str, Metric]", QUALITIES))
#: The metrics that follow from an architecture alone, without a model or data: its methods of those names.
DECLARED = tuple(name for name, metric in COSTS.items() if metric.source == "declared")


def declared_costs(architecture: Architecture, backbone: Backbone) -> dict[str, float]:
    """Return the values of the metrics in `DECLARED`."""
    return {name: getattr(architecture, name)(backbone) for name in DECLARED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A metric to optimise.

    `bound`: worst value that a user accepts; `reference`: corner for the hypervolume; `own`: the metric, if it is one
    of the study's own and not of `METRICS`. Both numbers are in the metric's own direction and unit. Everything behind
    this class is minimised; `loss` is the one place where the direction is applied.
    """

    name: str
    maximise: bool
    unit: str = ""
    bound: float | None = None
    reference: float | None = None
    own: Own | None = None

    @classmethod
    def of(cls, name: str, **settings: Any) -> Objective:
        """Return an objective over a known metric, or its `own`, with the metric's direction.

        Raises KeyError for an unknown one.
        """
        metric = settings.get("own") or METRICS[name]
        settings.setdefault("maximise", metric.maximise)
        return cls(name=name, unit=metric.unit, **settings)

    @property
    def metric(self) -> Metric:
        """Raises KeyError for an objective over a metric that nobody knows."""
        return self.own or METRICS[self.name]

    @property
    def is_quality(self) -> bool:
        """Whether it is found on held-out rows after a training, with an error."""
        return self.own is not None or self.name in QUALITIES

    def loss(self, value: Numbers) -> Numbers:
        """`value` turned so that less is better."""
        return -value if self.maximise else value

    def value(self, loss: float) -> float:
        """Invert `loss`."""
        return -loss if self.maximise else loss

    def violation(self, value: float) -> float:
        """How far `value` lies beyond the bound, relative to it as in `Limits`; <= 0 is within."""
        if self.bound is None:
            return -1.0
        return (self.loss(value) - self.loss(self.bound)) / (abs(self.bound) or 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A point and what a proxy says of it, less is better. `costs`: by metric, as far as they could be foretold."""

    genes: Assignment
    score: float
    costs: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A search space, what counts in it, and how many evaluations may be spent.

    What is known beforehand helps the searchers that can use it: `limits` that rule candidates out before training;
    `start`, points to evaluate first; `initial`, how many points to spread over the space before a model is trusted
    (None: the searcher's own); `known`, trials of this study that no searcher asked for, their genes those of this
    space; `earlier`, the same of a related study; `surrogate`, the kind of model (None: the searcher's choice);
    `scored`, points and what a proxy says of them.
    """

    space: SearchSpace
    objectives: tuple[Objective, ...]
    num_trials: int
    limits: Limits = field(default_factory=lambda: Limits({}))
    initial: int | None = None
    start: tuple[Assignment, ...] = ()
    known: tuple[Trial, ...] = ()
    earlier: tuple[Trial, ...] = ()
    surrogate: Surrogate | None = None
    scored: tuple[Scored, ...] = ()

    def violation(self, values: Mapping[str, float]) -> float:
        """How far values lie beyond the limits and bounds of those that are known; <= 0 is within all of them."""
        objection = self.limits.objection(values)
        bounds = (o.violation(values[o.name]) for o in self.objectives if o.name in values)
        return max([objection[0] if objection else -1.0, *bounds])


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How much of the full training is spent: the share of its steps, in (0, 1]; the schedule is the full run's."""

    share: float = 1.0
    #: Shares of the steps at which validation is run on the way, ascending.
    rungs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"a share of the steps lies in (0, 1], got {self.share}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one evaluation found. Values by metric name; `std_err` of the same names where sampling error is known."""

    values: Mapping[str, float]
    std_err: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    share: float = 1.0
    evaluator: str = ""
    wall_s: float = 0.0
    train_s: float = 0.0
    #: Mean training loss of each step.
    losses: tuple[float, ...] = ()
    #: Metrics at the rungs on the way: share of the steps, then values by name.
    rungs: tuple[tuple[float, Mapping[str, float]], ...] = ()
    #: Quality metrics per validation example, in the order of the file: what paired comparisons need. Of a metric over
    #: the set: contributions whose mean it is.
    per_example: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    #: Quality on the test split; only finalists and baselines have it.
    test: Mapping[str, float] = field(default_factory=dict)
    test_per_example: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    #: Spread (interquartile range) of measured costs.
    spread: Mapping[str, float] = field(default_factory=dict)
    #: What the routers of mixtures did on the validation split, by site: see `Routers.routes`.
    routes: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    #: Quality with all experts of every mixture weighted alike after the training; only finalists have it.
    averaged: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as ledgers hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """Invert `to_dict`, also from JSON, which has lists for tuples."""
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
            raise ValueError(f"a role of the kind {self.kind!r} and the name {self.name!r}")

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
    """One evaluation of one candidate, as the ledger keeps it."""

    number: int
    role: Role
    candidate: Candidate
    #: The searcher's active genes, by name; empty for baselines.
    genes: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    state: State = "running"
    measurement: Measurement | None = None
    #: Why it failed, is infeasible or was pruned.
    error: str | None = None
    #: For a finalist: the number of the trial that it repeats.
    of: int | None = None
    #: What the searcher wants back with the trial (JSON): its state comes from the trials alone.
    searcher_state: Mapping[str, Any] = field(default_factory=dict)
    #: Largest violation of a constraint or bound; <= 0 is feasible.
    violation: float = 0.0

    @property
    def values(self) -> Mapping[str, float]:
        """The metrics of a complete trial."""
        assert self.measurement is not None, f"trial {self.number} is {self.state}"
        return self.measurement.values
