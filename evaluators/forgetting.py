"""What trainings add to the losses on the retained rows, against the untouched model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from autopeft.evaluators.base import OutOfMemoryError, memory_errors
from autopeft.evaluators.data.splits import RETAINED
from autopeft.evaluators.errors import ModelError
from autopeft.evaluators.tasks import Batch, Task
from autopeft.search_space.metrics import FORGETTING, Columns, MetricError

if TYPE_CHECKING:
    from autopeft.evaluators.backbones import LoadedBackbone

#: Rows of the untouched model at a time, unless the memory is too small.
BATCH_SIZE = 64
#: Decimals of a difference of two losses in float32: equal networks in other batches differ after these.
DIGITS = 6
NEW_HEAD = (
    "forgetting compares with the untouched model, whose task head would be new, with random values: take a checkpoint"
    " that has a head for these labels, or leave forgetting out"
)


class Forgetting:
    """The losses of the untouched model on the retained rows, and the column of the metric `forgetting`.

    `lengths`: of the rows by split. `batch`: returns rows of a split as a batch. Raises MetricError without retained
    rows, and ModelError for a model whose outputs mean nothing before a training.
    """

    def __init__(
        self,
        loaded: LoadedBackbone,
        task: Task,
        lengths: dict[str, list[int]],
        batch: Callable[[str, Sequence[int]], Batch],
    ) -> None:
        if not all(split in lengths for split in RETAINED.values()):
            raise MetricError(f"{FORGETTING.name} cannot be computed: there are no retained rows")
        if loaded.backbone.head_modules and not loaded.pretrained_head:
            raise ModelError(NEW_HEAD)
        self.model: Any = loaded.model
        self.task = task
        self.lengths = lengths
        self.batch = batch
        self._untouched: dict[str, list[float]] = {}

    def measure(self, *, tested: bool) -> None:
        """Compute the losses of the untouched model, once. The model must have no adapters.

        `tested`: of the rows for the test, too.
        """
        for split in (*RETAINED.values(),)[: 1 + tested]:
            if split in self._untouched:
                continue
            batch_size = BATCH_SIZE
            while split not in self._untouched:
                try:
                    with memory_errors():
                        self._untouched[split] = self._losses(split, batch_size)
                except OutOfMemoryError:
                    if batch_size == 1:
                        raise
                    batch_size //= 2

    @torch.no_grad()
    def _losses(self, split: str, batch_size: int) -> list[float]:
        # As `batching.ordered_batches`, so that equal networks have equal batches and equal losses to the last bit.
        order = sorted(range(len(self.lengths[split])), key=lambda i: self.lengths[split][i])
        found = torch.zeros(len(order))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            found[rows] = self.task.scores(self.model, self.batch(split, rows))["loss"].float().cpu()
        losses: list[float] = found.tolist()
        return losses

    def column(self, split: str, trained: Columns, rows: Sequence[int] | None) -> Columns:
        """Return the column from those of a trained candidate over `rows` of a retained split (None: all)."""
        untouched = self._untouched[split]
        before = untouched if rows is None else [untouched[i] for i in rows]
        differences = [after - loss for after, loss in zip(trained["loss"], before, strict=True)]
        return {FORGETTING.name: [round(each, DIGITS) + 0.0 for each in differences]}  # and no -0.0
