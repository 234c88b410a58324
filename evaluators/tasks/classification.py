"""Classification of texts or pairs of texts, with one label or any number of labels per row.

Notation: N examples, C labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from autopeft.evaluators.rows import EMBEDDED_FUNCTIONS, DataConfig, Row, name_of, names_of, text_of
from autopeft.evaluators.tasks.base import Example, Scored, Task
from autopeft.evaluators.tasks.text import TextTask
from autopeft.search_space.metrics.base import BRIER, CONFIDENCE, PREDICTION, PREDICTIONS, TARGET, TARGETS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

#: By the column of a first text, usual columns of the text that belongs to it.
PARTNERS = {
    "text": ("text_pair", "text2"),
    "text1": ("text2",),
    "text_a": ("text_b",),
    "sentence1": ("sentence2",),
    "question1": ("question2",),
    "premise": ("hypothesis",),
    "question": ("sentence", "passage", "context"),
}
#: More labels that are numbers with a fraction are a regression target, not classes; so are more that have at least
#: three decimals, which ratings do not have.
MOST_FRACTIONS, MOST_LONG_FRACTIONS = 20, 2


class Classification(TextTask):
    """One label per row, with the cross-entropy of the softmax as loss. `data.labels` selects `MultiLabel`."""

    name = "classification"
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    columns = frozenset({"loss", "accuracy", TARGET, PREDICTION, BRIER, CONFIDENCE})
    has_labels = True
    problem_type: ClassVar[str | None] = "single_label_classification"
    distils = True
    trainer = "Trainer"

    @override
    @classmethod
    def for_data(cls, data: DataConfig) -> type[Task]:
        return MultiLabel if data.labels is not None else cls

    @override
    @classmethod
    def for_rows(cls, rows: Sequence[Row]) -> type[Task]:
        return MultiLabel if rows and "labels" in rows[0] else cls

    @override
    @classmethod
    def problems(cls, data: DataConfig, model_id: str) -> Iterator[tuple[tuple[str, ...], str]]:
        if data.source == EMBEDDED_FUNCTIONS:
            yield ("data", "source"), "these embedded rows are chats without labels: set task: causal-lm"

    @override
    @classmethod
    def row(cls, row: Row, data: DataConfig) -> Row:
        return {**_texts(row, data), "label": name_of(row, data.label, "label")}

    @override
    @classmethod
    def unread(cls, row: Row, data: DataConfig) -> Mapping[str, str]:
        partners = PARTNERS.get(data.text, ()) if data.text_pair is None else ()
        return {name: f"set data.text_pair to {name!r} if the rows are pairs" for name in partners if row.get(name)}

    @override
    @classmethod
    def input_of(cls, row: Row) -> Any:
        return [row["text"], row["text_pair"]] if "text_pair" in row else row["text"]

    @override
    @classmethod
    def labels_of(cls, row: Row) -> Sequence[str]:
        return (row["label"],)

    @override
    @classmethod
    def label_problem(cls, labels: Sequence[str]) -> str | None:
        if len(labels) < 2:
            return f"all rows have the label {labels[0]!r}: classification needs at least two labels"
        fractions = [label for label in labels if _is_fraction(label)]
        long = [label for label in fractions if len(label.partition(".")[2]) > 2]
        if len(fractions) > MOST_FRACTIONS or len(long) > MOST_LONG_FRACTIONS:
            return (
                f"the labels have {len(fractions)} distinct numbers with a fraction, such as {fractions[0]!r}, which"
                " looks like a regression target: group the numbers into a few classes, or add a letter to each label"
                " if they are names of classes"
            )
        return None

    @override
    @classmethod
    def truth(cls, rows: Sequence[Row], labels: Sequence[str]) -> NDArray[np.int64] | None:
        """Return the indices of labels, [N]."""
        import numpy as np

        return np.array([labels.index(row["label"]) for row in rows])

    @override
    @classmethod
    def load_processor(cls, model_id: str, folder: str, revision: str | None) -> PreTrainedTokenizerBase:
        tokenizer = super().load_processor(model_id, folder, revision)
        # As `inputs` pads: models with absolute positions give other logits for texts padded on the left.
        tokenizer.padding_side = "right"
        return tokenizer

    @override
    @classmethod
    def model_settings(cls, labels: Sequence[str] | None) -> dict[str, Any]:
        names = [str(label) for label in labels or ("0", "1")]
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": cls.problem_type,
        }

    @override
    @classmethod
    def same_outputs(cls, config: Any, labels: Sequence[str] | None) -> bool:
        """Return whether a checkpoint's outputs are `labels` in this order; numeric labels are positions."""
        names = [str(name) for _, name in sorted(config.id2label.items())]
        unnamed = names == [f"LABEL_{i}" for i in range(len(names))]
        return unnamed or labels is None or all(label.isdecimal() for label in labels) or names == list(labels)

    @override
    def encode(self, rows: Sequence[Row]) -> list[Example]:
        pairs = [row["text_pair"] for row in rows] if rows and "text_pair" in rows[0] else None
        tokens = self.tokens([row["text"] for row in rows], pairs)
        return [{**example, **self._target(row), **self.domain(row)} for example, row in zip(tokens, rows, strict=True)]

    def _target(self, row: Row) -> dict[str, Any]:
        return {"label": self.labels.index(row["label"])}

    @override
    def targets(self, examples: Sequence[Example], width: int) -> Tensor:
        import torch

        return torch.tensor([example["label"] for example in examples])

    @override
    def score(self, logits: Tensor, targets: Tensor) -> Scored:
        """Return the columns [N] from logits [N, C] and targets [N], indices of labels."""
        import torch
        from torch.nn.functional import cross_entropy

        losses = cross_entropy(logits.float(), targets, reduction="none")
        predictions = logits.detach().argmax(-1)
        accuracies = (predictions == targets).float()
        columns = {"loss": losses, "accuracy": accuracies, TARGET: targets, PREDICTION: predictions}
        if torch.is_grad_enabled():  # a training step reads the loss alone
            return columns
        shares = logits.float().softmax(-1)
        # The sum over classes of (p - y)^2, with y = 1 for the target and 0 for the others.
        errors = shares.square().sum(-1) - 2 * shares.gather(-1, targets[:, None])[:, 0] + 1
        return {**columns, BRIER: errors.clamp(min=0.0), CONFIDENCE: shares.amax(-1)}


class MultiLabel(Classification):
    """Any number of labels per row; the loss is the mean over labels of the sigmoid's binary cross-entropy.

    This is transformers' problem_type "multi_label_classification". A label is predicted if its logit is positive, and
    `accuracy` is the share of rows whose predicted set of labels is exactly right (scikit-learn's `accuracy_score`).
    """

    columns = frozenset({"loss", "accuracy", TARGETS, PREDICTIONS})
    problem_type: ClassVar[str | None] = "multi_label_classification"
    distils = False

    @override
    @classmethod
    def problems(cls, data: DataConfig, model_id: str) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().problems(data, model_id)
        if data.label != DataConfig().label:
            yield (
                ("data", "label"),
                f"cannot be combined with data.labels ({data.labels!r}): rows have one label or a list of labels",
            )

    @override
    @classmethod
    def row(cls, row: Row, data: DataConfig) -> Row:
        assert data.labels is not None
        return {**_texts(row, data), "labels": names_of(row, data.labels, "label")}

    @override
    @classmethod
    def labels_of(cls, row: Row) -> Sequence[str]:
        return tuple(row["labels"])

    @override
    @classmethod
    def label_problem(cls, labels: Sequence[str]) -> str | None:
        return None if labels else "no row has a label: multi-label classification needs at least one label"

    @override
    @classmethod
    def truth(cls, rows: Sequence[Row], labels: Sequence[str]) -> NDArray[np.int64] | None:
        """Return indicators [N, C]: 1 for the labels of each row, 0 for other labels."""
        import numpy as np

        return np.array([[int(label in row["labels"]) for label in labels] for row in rows])

    @override
    def _target(self, row: Row) -> dict[str, Any]:
        return {"labels": [float(label in row["labels"]) for label in self.labels]}

    @override
    def targets(self, examples: Sequence[Example], width: int) -> Tensor:
        import torch

        return torch.tensor([example["labels"] for example in examples])

    @override
    def score(self, logits: Tensor, targets: Tensor) -> Scored:
        """Return columns [N] and [N, C] from logits [N, C] and targets [N, C] of 0 and 1."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        losses = binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(-1)
        predictions = (logits.detach() > 0).float()
        accuracies = (predictions == targets).all(-1).float()
        return {"loss": losses, "accuracy": accuracies, TARGETS: targets, PREDICTIONS: predictions}


def _is_fraction(label: str) -> bool:
    """Return whether a label is a finite number that is not whole."""
    try:
        number = float(label)
    except ValueError:
        return False
    return isfinite(number) and not number.is_integer()


def _texts(row: Row, data: DataConfig) -> Row:
    pair = {} if data.text_pair is None else {"text_pair": text_of(row, data.text_pair)}
    return {"text": text_of(row, data.text), **pair}
