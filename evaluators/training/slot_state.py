"""A candidate in packed training, and its state between two packs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.moves import moving
from autopeft.evaluators.base import Outcome, Request
from autopeft.evaluators.training.optimizer import PackedAdamW
from autopeft.evaluators.training.record import Record
from autopeft.search_space.training import Training


@dataclass(frozen=True, slots=True)
class SlotState:
    """A slot's values and moments by group and name, the states of its random streams, and what of it moves.

    `moved`: for each adapter that moves, the tensors that are not trained and its notes.
    """

    tensors: dict[str, dict[str, Tensor]]
    streams: dict[str, Tensor]
    moved: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]

    @classmethod
    def capture(cls, attachment: Attachment, optimizer: PackedAdamW, k: int) -> Self:
        """Copy the state of slot `k`."""
        groups = optimizer.parts(k)
        return cls(
            {group: {name: view.clone() for name, view in views.items()} for group, views in groups.items()},
            {name: stream.get_state() for name, stream in attachment.dropout_streams(k).items()},
            {
                key: ({name: bank.of_slot(j)[name].clone() for name in bank.untrained}, {**bank.watch.notes[j]})
                for key, bank, j in moving(attachment, k)
            },
        )

    def restore(self, attachment: Attachment, optimizer: PackedAdamW, k: int) -> None:
        """Write the state into slot `k` of another pack."""
        for group, views in optimizer.parts(k).items():
            for name, view in views.items():
                view.copy_(self.tensors[group][name])
        for name, stream in attachment.dropout_streams(k).items():
            stream.set_state(self.streams[name])
        for key, bank, j in moving(attachment, k):
            tensors, notes = self.moved[key]
            for name, value in tensors.items():
                bank.of_slot(j)[name].copy_(value)
            bank.watch.notes[j] = {**notes}


@dataclass(slots=True, eq=False)
class Run:
    """A candidate in training.

    `stops`: step and share of each rung and of the end. `depth`: number of layers below its lowest adapter. `state`:
    its state between two packs, None before the first step. `alone`: whether it must be the only one of its pack.
    `all_columns`: whether generated texts and what is forgotten are measured at its rungs, too: it has their values if
    it stops there.
    """

    index: int
    request: Request
    training: Training
    full: int
    depth: int
    alone: bool
    stops: tuple[tuple[int, float], ...]
    record: Record
    all_columns: bool = False
    #: Number of stops that were reached.
    passed: int = 0
    step: int = 0
    state: SlotState | None = None
    outcome: Outcome | None = None

    @property
    def stop(self) -> int:
        """The step of the next stop."""
        return self.stops[self.passed][0]

    @property
    def share(self) -> float:
        """The share of the steps at the next stop."""
        return self.stops[self.passed][1]

    @property
    def num_steps(self) -> int:
        """The number of steps to the end."""
        return self.stops[-1][0]

    @property
    def order(self) -> tuple[int, int, int]:
        """Key of the minibatches that follow: they are the same for runs with the same key."""
        return self.request.seed, self.training.batch_size, self.step
