"""A task: how rows become tensors, how logits become losses and columns for metrics, and what others must know of it.

Others are the study file, the loader of models and the exporters. Nothing here imports torch before it is used: study
files are read without it.

Notation: N examples, T tokens (padded), C labels, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from autopeft.evaluators.rows import DataSettings, Row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from autopeft.search_space.backbones.backbone import Backbone

Example = Mapping[str, Any]
Batch = dict[str, "Tensor"]
#: By name, [N] each, or [N, C] with a number per label: see `search_space/metrics/base.py`. `loss` is the one that is
#: differentiated.
Scored = dict[str, "Tensor"]
IGNORED = -100
#: The part of a batch that the model does not read.
BESIDE_THE_MODEL = ("targets", "domains")


def model_inputs(batch: Batch) -> Batch:
    """Return the tensors of a batch that the model reads."""
    return {name: tensor for name, tensor in batch.items() if name not in BESIDE_THE_MODEL}


class Task(ABC):
    """One kind of thing to learn. Its class says what can be known without a model; an object prepares rows and scores.

    A subclass in a file of its own, registered in `TASKS` or by the entry point group `autopeft.tasks`, is all that a
    new task takes. `encode` once, `collate` per batch; `score` on the logits of the transformers model.

    `processor`: what `load_processor` returned. `labels`, `domains`: as `load_splits` found them.
    """

    name: ClassVar[str]
    #: The auto class of transformers that loads the model.
    auto_class: ClassVar[str]
    #: What `load_processor` loads, in words.
    processor_name: ClassVar[str]
    #: The `task_type` of peft's configurations.
    peft_task_type: ClassVar[str]
    #: Columns that `score` returns.
    columns: ClassVar[frozenset[str]] = frozenset({"loss", "accuracy"})
    #: Whether rows have labels, which are the outputs of the model.
    has_labels: ClassVar[bool] = False
    #: `problem_type` of transformers' configurations, where labels have one.
    problem_type: ClassVar[str | None] = None
    #: Whether the softmax of the logits, [N, C], is a distribution over the labels: one model can teach another then.
    distils: ClassVar[bool] = False
    #: The trainer of other libraries that trains the same on the same rows; None: exports of a way to train refuse.
    trainer: ClassVar[Literal["Trainer", "SFTTrainer"] | None] = None

    def __init__(
        self,
        processor: Any,
        max_length: int,
        labels: Sequence[str] | None,
        domains: Sequence[str] | None = None,
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        self.labels = tuple(labels or ())
        self.domains = tuple(domains or ())

    # Variants: one name, and settings of the data that make another loss or other columns of it

    @classmethod
    def for_data(cls, data: DataSettings) -> type[Task]:
        """Return the class for these settings of the data: this one, unless the task has variants."""
        return cls

    @classmethod
    def for_rows(cls, rows: Sequence[Row]) -> type[Task]:
        """Return the class for rows that `row` of one of the variants has made."""
        return cls

    # Study files and rows

    @classmethod
    def problems(cls, data: DataSettings, model_id: str) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield keys of a study file and what is wrong there for this task, as far as the settings show it."""
        yield from ()

    @classmethod
    @abstractmethod
    def row(cls, row: Row, data: DataSettings) -> Row:
        """Return the row with the task's own field names and nothing else. Raises ValueError."""

    @classmethod
    @abstractmethod
    def input_of(cls, row: Row) -> Any:
        """Return the part of a row of `row` that the model sees, as JSON: it should not stand in two splits."""

    @classmethod
    def labels_of(cls, row: Row) -> Sequence[str]:
        """Return the labels of a row of `row`, any number of them."""
        return ()

    @classmethod
    def label_problem(cls, labels: Sequence[str]) -> str | None:
        """Return why there is nothing to learn from training rows with these labels, or None."""
        return None

    @classmethod
    def truth(cls, rows: Sequence[Row], labels: Sequence[str]) -> NDArray[np.int64] | None:
        """Return the targets of rows as functions over a set take them (see `OverSet`), or None if there are none."""
        return None

    # The model and what prepares its inputs

    @classmethod
    @abstractmethod
    def load_processor(cls, model_id: str, folder: str, revision: str | None) -> Any:
        """Return what turns rows into inputs: a tokenizer, an image processor. Raises ModelError where there is none.

        `folder`: where the model that the user calls `model_id` is, a folder or an id of the hub.
        """

    @classmethod
    def model_settings(cls, labels: Sequence[str] | None) -> dict[str, Any]:
        """Return the settings of the model's configuration that follow from the labels."""
        return {}

    @classmethod
    def same_outputs(cls, config: Any, labels: Sequence[str] | None) -> bool:
        """Whether the outputs of a checkpoint with this configuration are those of the task already."""
        return True

    @classmethod  # noqa: B027
    def check_model(cls, model: nn.Module, backbone: Backbone) -> None:
        """Raise ModelError for a model that cannot learn the task."""

    @classmethod  # noqa: B027
    def configure(cls, model: Any, processor: Any) -> None:
        """Tell a loaded model what it must know of the processor."""

    def check(self, model: Any, examples: Iterable[Example]) -> None:  # noqa: B027
        """Raise DataError for examples that the model cannot read, before every candidate fails on them."""

    # Examples and scores

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Return model inputs and targets, not padded, and `domain` of each row."""

    def domain(self, row: Row) -> dict[str, int]:
        """Return the part of an example that says which domain it is of; nothing where there are none."""
        return {"domain": self.domains.index(row["domain"])} if self.domains else {}

    @abstractmethod
    def length(self, example: Example) -> int:
        """Return the positions that an example takes in the model's layers."""

    @abstractmethod
    def inputs(self, examples: Sequence[Example]) -> Batch:
        """Return the padded inputs of the model, [N, ...] each."""

    @abstractmethod
    def targets(self, examples: Sequence[Example], width: int) -> Tensor:
        """Return the values that `score` compares with: [N], [N, C] or, for the tokens of examples, [N, width]."""

    @abstractmethod
    def score(self, logits: Tensor, targets: Tensor) -> Scored:
        """Return the `columns` of each example: `loss`, differentiable, `accuracy`, and those of metrics over a set."""

    def scores(self, model: nn.Module, batch: Batch) -> Scored:
        """Return the columns of a collated batch: the forward pass and `score`."""
        return self.score(model(**model_inputs(batch)).logits, batch["targets"])

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the padded `inputs`, the `targets`, and where there are domains, `domains` [N]."""
        import torch

        width = max(map(self.length, examples))
        batch = {**self.inputs(examples), "targets": self.targets(examples, width)}
        if self.domains:
            batch["domains"] = torch.tensor([example["domain"] for example in examples])
        return batch
