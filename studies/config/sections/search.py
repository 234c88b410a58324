"""The sections of the search: objectives, constraints, searcher, proxies, baselines and finalists."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from autopeft.search_space.domains import MOST
from autopeft.search_space.problem import Goal, SurrogateKind
from autopeft.studies.config.sections.base import (
    Count,
    Duration,
    Positive,
    Scalar,
    Section,
    Share,
)


class MetricSettings(Section):
    """A metric: a mapping, or just its name."""

    name: str = Field(description="a metric; name@domain: over the rows of a domain; name@worst: of the worst domain")
    bound: float | None = Field(default=None, description="worst acceptable value")
    direction: Literal["maximise", "minimise"] | None = Field(default=None, description="default: the metric's own")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class ReportedSettings(MetricSettings):
    """A metric that every candidate is measured by, and that the search does not optimise."""


class ObjectiveSettings(MetricSettings):
    """An objective."""

    reference: float | None = Field(
        default=None, description="reference value for the hypervolume; default: from the trials"
    )


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
    timeout_s: Duration | None = Field(
        default=None,
        description="seconds that the search may take over all runs of the study, without its baselines and finalists;"
        " by the measured pace of a training no candidate is begun that would exceed them, except for the first",
    )


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


class BaselineSettings(Section):
    """Baselines for comparison with the front, each tuned over the learning rate; a rule has a rate of its own."""

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
