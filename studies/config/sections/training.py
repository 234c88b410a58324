"""The sections about trainings: their settings, and how candidates are evaluated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import (
    Field,
)

from autopeft.search_space.training import Training
from autopeft.studies.config.sections.base import (
    Count,
    GrowingSection,
    Range,
    Section,
    Setting,
)

if TYPE_CHECKING:
    from autopeft.evaluators.texts import Generation

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


class EvaluationSettings(GrowingSection):
    """How candidates are trained. It changes the duration of a study but not its results, except for rounding."""

    later: ClassVar = {"micro_batch": (None,), "checkpointing": (None,)}

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
    micro_batch: Count | None = Field(
        default=None,
        description="rows of a minibatch at a time, whose gradients add up; null: as many as fit into the memory",
    )
    checkpointing: bool | None = Field(
        default=None,
        description="keep the inputs of the layers only, and run the layers again in the backward pass, which takes"
        " about half as long again; null: if a step does not fit without",
    )


class GenerationSettings(GrowingSection):
    """Greedy texts after the prompts of the held-out rows, which metrics of texts read (causal-lm)."""

    later: ClassVar = {"run_code": (False,)}

    max_new_tokens: Count | None = Field(
        default=None,
        description="tokens at which a text is cut off; null: as many as the longest reference of the validation rows",
    )
    every: Literal["end", "rung"] = Field(
        default="end",
        description="end: after a training, and at rungs where search.keep may stop candidates; rung: at every rung",
    )
    pattern: str | None = Field(
        default=None,
        min_length=1,
        description="regular expression of the metric regex-match, to be found in the text; what its groups capture"
        " must be the same in the reference",
    )
    run_code: bool = Field(
        default=False,
        description="consent to running the generated programs on this machine, which pass-at-1 does; use a container",
    )

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide results, without those that are not set."""
        return {name: value for name in ("max_new_tokens", "pattern") if (value := getattr(self, name)) is not None}

    def for_evaluators(self) -> Generation:
        """Return the argument of evaluators."""
        from autopeft.evaluators.texts import Generation

        return Generation(max_new_tokens=self.max_new_tokens, at_rungs=self.every == "rung", run_code=self.run_code)
