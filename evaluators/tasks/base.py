"""The interface of tasks: from rows to tensors, and from logits to losses and the columns that metrics read.

The class of a task also has the facts that study files, the loader of models and exporters need. Modules of tasks
import torch only where they use it, because study files are read without it.

Notation: N examples, T tokens (padded), C labels, V vocabulary.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from autopeft.evaluators.rows import DataConfig, Row
from autopeft.search_space.metrics.texts import TEXTS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from autopeft.search_space.backbones.backbone import Backbone

Example = Mapping[str, Any]
Batch = dict[str, "Tensor"]
#: Columns by name, each [N], or [N, C] with a number per label: see `search_space/metrics/base.py`. Training minimises
#: the mean of `loss`.
Scored = dict[str, "Tensor"]
#: The target of tokens without a loss.
IGNORED = -100
#: Tensors of a batch that the model does not read.
BESIDE_THE_MODEL = ("targets", "domains")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The numbers of tokens that `max_length` cut off a row.

    `prompt`: of what precedes the first token with a loss. `text`: of the rest. `learnt`: of these, those with a loss
    of their own. `no_prompt`: whether nothing of the prompt is left.
    """

    prompt: int = 0
    text: int = 0
    learnt: int = 0
    no_prompt: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompted:
    """The tokens before a text that a model is to generate, and those of the example's own text, the reference."""

    prompt: Sequence[int]
    reference: Sequence[int]
    domain: int = 0


def model_inputs(batch: Batch) -> Batch:
    """Return the tensors of a batch that the model reads."""
    return {name: tensor for name, tensor in batch.items() if name not in BESIDE_THE_MODEL}


class Task(ABC):
    """A learning task. The class has the facts that need no model; an object encodes rows and computes scores.

    A new task is a subclass in its own file, registered in `TASKS` or by the entry point group `autopeft.tasks`.
    `encode` runs once, `collate` per batch, and `score` on the logits of the transformers model.

    `processor`: the return value of `load_processor`. `labels`, `domains`: as in `Splits`.
    """

    name: ClassVar[str]
    #: The auto class of transformers that loads the model.
    auto_class: ClassVar[str]
    #: The kind of processor that `load_processor` loads, for messages.
    processor_name: ClassVar[str]
    #: The auto class of transformers that loads the processor from an export.
    auto_processor: ClassVar[str] = "AutoProcessor"
    #: The `task_type` of peft's configurations.
    peft_task_type: ClassVar[str]
    #: Columns that `score` returns.
    columns: ClassVar[frozenset[str]] = frozenset({"loss", "accuracy"})
    #: Whether rows have labels, which are the outputs of the model.
    has_labels: ClassVar[bool] = False
    #: `problem_type` of transformers' configurations, where labels have one.
    problem_type: ClassVar[str | None] = None
    #: Whether the softmax of the logits [N, C] is a distribution over the labels, as distillation requires.
    distils: ClassVar[bool] = False
    #: Whether rows may be conversations, of which `DataConfig.train_on_turns` says what is learnt.
    has_turns: ClassVar[bool] = False
    #: Whether a model generates texts after the prompts of `prompted`, which metrics of texts then read.
    generates: ClassVar[bool] = False
    #: The trainer of other libraries for the same loss on the same rows. None: training scripts cannot be exported.
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

    # Variants: classes of one name, chosen by the data settings, with another loss or other columns

    @classmethod
    def for_data(cls, data: DataConfig) -> type[Task]:
        """Return the class for these data settings: this class, unless the task has variants."""
        return cls

    @classmethod
    def for_rows(cls, rows: Sequence[Row]) -> type[Task]:
        """Return the class for rows that `row` of one of the variants returned."""
        return cls

    @classmethod
    def readable(cls) -> frozenset[str]:
        """Return the columns that metrics can read: those of `score`, and texts if the task generates them."""
        return cls.columns | set(TEXTS) if cls.generates else cls.columns

    # Study files and rows

    @classmethod
    def problems(cls, data: DataConfig, model_id: str) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield problems of the settings for this task: the key in the study file, and a message."""
        yield from ()

    @classmethod
    @abstractmethod
    def row(cls, row: Row, data: DataConfig) -> Row:
        """Return the row with the task's own field names, without other fields. Raises ValueError."""

    @classmethod
    def unread(cls, row: Row, data: DataConfig) -> Mapping[str, str]:
        """Return the columns of a file's row that say a part of it and that `row` leaves out, with what to do."""
        return {}

    @classmethod
    def retained(cls, row: Row) -> Row:
        """Return a row that is not to be forgotten, without what the task alone adds to it."""
        return row

    @classmethod
    @abstractmethod
    def input_of(cls, row: Row) -> Any:
        """Return the part of a row that the model sees, as JSON; two splits should not share it."""

    @classmethod
    def labels_of(cls, row: Row) -> Sequence[str]:
        """Return the labels of a row, in any number."""
        return ()

    @classmethod
    def label_problem(cls, labels: Sequence[str]) -> str | None:
        """Return the reason why training rows with only these labels cannot be learnt from, or None."""
        return None

    @classmethod
    def truth(cls, rows: Sequence[Row], labels: Sequence[str]) -> NDArray[np.int64] | None:
        """Return the targets of rows in the form of `OverSet.of`, or None for a task without such targets."""
        return None

    # The model and its processor

    @classmethod
    @abstractmethod
    def load_processor(cls, model_id: str, folder: str, revision: str | None) -> Any:
        """Load the processor of the model's inputs, such as a tokenizer. Raises ModelError if the model has none.

        `model_id`: the user's name of the model, for messages. `folder`: its folder or hub id.
        """

    @classmethod
    def model_settings(cls, labels: Sequence[str] | None) -> dict[str, Any]:
        """Return the entries of the model's configuration that follow from the labels."""
        return {}

    @classmethod
    def same_outputs(cls, config: Any, labels: Sequence[str] | None) -> bool:
        """Return whether a checkpoint with this configuration already has the outputs of the task."""
        return True

    @classmethod  # noqa: B027
    def check_model(cls, model: nn.Module, backbone: Backbone) -> None:
        """Raise ModelError for a model that is unsuitable for the task."""

    @classmethod  # noqa: B027
    def configure(cls, model: Any, processor: Any) -> None:
        """Set the entries of a loaded model's configuration that follow from the processor."""

    def limit(self, model: Any) -> int:
        """Return the largest number of positions of an example that the model takes."""
        return sys.maxsize

    def misfits(self, model: Any, examples: Sequence[Example]) -> Iterator[tuple[int | None, str]]:
        """Yield problems of examples that the model cannot read: the position of the example, or None for all.

        The model may be without weights, on torch's meta device.
        """
        yield from ()

    # Examples and scores

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Return an example per row: unpadded model inputs, targets, and `domain` if there are domains.

        Beside these, `cut` (a `Cut`) of a row that `max_length` cuts, and `unread`: parts of the row that the processor
        leaves out, with what to do. Raises DataError for a row that it cannot encode.
        """

    def domain(self, row: Row) -> dict[str, int]:
        """Return the entry `domain` of a row's example, an index; empty if there are no domains."""
        return {"domain": self.domains.index(row["domain"])} if self.domains else {}

    def learnt(self, example: Example) -> list[bool] | None:
        """Return which positions of an example have a loss; None where the example has a single target."""
        return None

    def prompted(self, example: Example) -> Prompted | None:
        """Return the prompt of an example, after which a model generates a text; None if there is none."""
        return None

    @abstractmethod
    def length(self, example: Example) -> int:
        """Return the number of positions of an example in the model's layers."""

    def shortened(self, example: Example, most: int) -> Example:
        """Return the example with at most `most` positions if the task can cut it, for tests of the model itself."""
        return example

    @abstractmethod
    def inputs(self, examples: Sequence[Example]) -> Batch:
        """Return the padded inputs of the model, each [N, ...]."""

    @abstractmethod
    def targets(self, examples: Sequence[Example], width: int) -> Tensor:
        """Return the targets for `score`: [N], [N, C] or, for targets per token, [N, width]."""

    @abstractmethod
    def score(self, logits: Tensor, targets: Tensor) -> Scored:
        """Return the `columns`, among them a differentiable `loss` and `accuracy`, each [N] or [N, C].

        Columns that take time may be left out while gradients are enabled: a training step reads the loss alone.
        """

    def scores(self, model: nn.Module, batch: Batch) -> Scored:
        """Run the model on a collated batch and return its columns."""
        return self.score(model(**model_inputs(batch)).logits, batch["targets"])

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return a batch: the padded `inputs`, the `targets`, and `domains` [N] if there are domains."""
        import torch

        width = max(map(self.length, examples))
        batch = {**self.inputs(examples), "targets": self.targets(examples, width)}
        if self.domains:
            batch["domains"] = torch.tensor([example["domain"] for example in examples])
        return batch
