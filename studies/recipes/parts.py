"""The parts of a recipe, apart from its architecture and its training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from autopeft.search_space.metrics import UserDefined, user_defined
from autopeft.studies.config.earlier import FIRST_TURNS
from autopeft.studies.config.fingerprint import changes
from autopeft.studies.config.sections.inputs import DataSettings
from autopeft.studies.config.sections.lm_eval import LmEvalSettings

if TYPE_CHECKING:
    from autopeft.evaluators import rows
    from autopeft.evaluators.data.splits import Splits

Dtype = Literal["float32", "bfloat16", "float16"]


class Part(BaseModel):
    """Base of the parts of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RecipeBackbone(Part):
    """The frozen model, as in `Backbone`."""

    id: str
    revision: str | None = None
    family: str
    hidden_size: int
    num_layers: int
    num_params: int
    causal: bool = False
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    dtype: Dtype = "float32"

    @model_serializer(mode="wrap")
    def _serialize(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a quantisation that there is not, so that older recipes stay equal."""
        return {name: value for name, value in default(self).items() if name != "quantization" or value is not None}


class RecipeData(DataSettings):
    """The data section of the study file; names of files are relative to `folder`."""

    folder: str = "."

    def path(self, split: str) -> Path:
        """Return the file of a split, for the source "files"."""
        return Path(self.folder) / Path(getattr(self, split)).expanduser()

    def for_loading(self) -> rows.DataConfig:
        """Return the argument of `load_splits`."""
        from autopeft.evaluators.rows import DataConfig

        given = {"train_on_turns": FIRST_TURNS} | {name: value for name, value in self if value is not None}
        return DataConfig(**{**given, "folder": Path(self.folder)})


class Measured(Part):
    """A measured value. `low` and `high`: the promised interval for one run with a new seed, or None."""

    value: float
    std_err: float | None = None
    low: float | None = None
    high: float | None = None
    split: Literal["train", "validation", "test"]
    seeds: tuple[int, ...] = ()


class Difference(Part):
    """A difference of means with its 95 % interval."""

    value: float
    std_err: float
    low: float
    high: float


class Comparison(Part):
    """The place of the candidate on the front of its study, by its validation scores of one metric.

    `value`: the mean over fresh seeds. `difference`: to the best member, None for that one. `standing`: see
    `analysis/recommendation.py`.
    """

    metric: str
    value: float
    std_err: float
    standing: str
    recommended: bool
    difference: Difference | None = None


class Averaged(Part):
    """Validation scores, as means over the same runs: `value` with equal gates, `routed` with the routers."""

    value: float
    routed: float
    seeds: tuple[int, ...]


class OwnMetric(Part):
    """A user-defined metric: module:function, in the folder of the data or installed.

    Its code runs only with the explicit consent of the user.
    """

    function: str
    direction: Literal["maximise", "minimise"] = "maximise"

    @property
    def place(self) -> str:
        """The code, for messages."""
        return self.function

    def declared(self, name: str, of_texts: bool = False) -> UserDefined:
        """Return the metric without loading its code. `of_texts`: for a task that generates. Raises MetricError."""
        return user_defined(name, self.function, self.direction == "maximise", of_texts)


class OwnTask(LmEvalSettings):
    """A task of lm-eval as a metric; its folder is relative to that of the data, and may hold code."""

    direction: Literal["maximise", "minimise"] = "maximise"

    @property
    def place(self) -> str:
        """The task, for messages."""
        return f"lm-eval task {self.lm_eval}"

    def declared(self, name: str, of_texts: bool = False) -> UserDefined:
        """Return the metric without its documents."""
        return self.metric_of(name, self.direction == "maximise")


class RecipeGeneration(Part):
    """The settings of the study on which the values of metrics of texts depend, as in `GenerationSettings`."""

    max_new_tokens: int | None = None
    pattern: str | None = None


class RowsDigest(Part):
    """The number of the rows of a split, and their digest."""

    rows: int
    digest: str


class Contents(Part):
    """What the study read, see `evaluators/contents.py`: a path does not tell whether rows or weights have changed."""

    rows: dict[str, RowsDigest]
    weights: str

    def changes(self, splits: Splits, weights: str | None = None) -> list[str]:
        """Return what has changed since, a sentence for each. `weights`: the digest of a model, if it is compared."""
        from autopeft.evaluators.contents import of_rows

        return changes(self.model_dump(), {"rows": of_rows(splits), "weights": weights or self.weights})


class Provenance(Part):
    """The origin of a recipe. `packages`: versions by name. `created`: time in ISO 8601."""

    study: str
    trial: int
    autopeft: str
    packages: dict[str, str] = {}
    created: str
