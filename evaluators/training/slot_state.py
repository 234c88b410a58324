"""The state of one candidate between two packs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.training.optimizer import PackedAdamW


@dataclass(frozen=True, slots=True)
class SlotState:
    """A slot's values and moments by group and name, and the states of its random streams."""

    tensors: dict[str, dict[str, Tensor]]
    streams: dict[str, Tensor]

    @classmethod
    def capture(cls, attachment: Attachment, optimizer: PackedAdamW, k: int) -> Self:
        """Copy the state of slot `k`."""
        groups = optimizer.parts(k)
        return cls(
            {group: {name: view.clone() for name, view in views.items()} for group, views in groups.items()},
            {name: stream.get_state() for name, stream in attachment.dropout_streams(k).items()},
        )

    def restore(self, attachment: Attachment, optimizer: PackedAdamW, k: int) -> None:
        """Write the state into slot `k` of another pack."""
        for group, views in optimizer.parts(k).items():
            for name, view in views.items():
                view.copy_(self.tensors[group][name])
        for name, stream in attachment.dropout_streams(k).items():
            stream.set_state(self.streams[name])
