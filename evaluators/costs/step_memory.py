"""The bytes that a training step holds, counted from what its forward pass saves; without a device they are the same.

Counted are, for each trained parameter, its gradient and AdamW's two moments; and the storages that the forward pass
keeps for the backward pass, each once and whole, without those of parameters and buffers. Nothing is kept below the
first trained tensor. With checkpointed layers these are the inputs of the layers and what lies outside of them, and
beside these what the largest layer keeps when it runs again.

Not counted: what lives within one operation only, gradients of activations, the allocator's slack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.layers import Forward, wrapped_layers
from autopeft.evaluators.tasks import Batch, Task


def step_bytes(attachment: Attachment, task: Task, batch: Batch, checkpointing: bool = False) -> int:
    """Return the bytes that a training step on `batch` holds beside the parameters; see the top of this file."""
    attachment.routers.tokens.domains = batch.get("domains")

    def loss() -> Tensor:
        losses = task.scores(attachment.model[0], batch)["loss"].mean()[None]
        return attachment.routers.penalised(losses)

    return trained_bytes(attachment) + saved_bytes(attachment, loss, checkpointing)


def trained_bytes(attachment: Attachment) -> int:
    """Return the bytes of gradients and moments."""
    return 3 * sum(parameter.nbytes for parameter, _ in attachment.trainable())


def saved_bytes(attachment: Attachment, loss: Callable[[], Tensor], checkpointing: bool = False) -> int:
    """Return the bytes of the storages that the computation of `loss` saves for the backward pass."""
    owners = (attachment.model[0], attachment)
    resident = _Storages(t for owner in owners for t in (*owner.parameters(), *owner.buffers()))
    saved = _Storages()
    largest = 0

    def wrap(layer: int, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal largest
            for value in (*args, *kwargs.values()):
                for tensor in value if isinstance(value, tuple) else (value,):
                    if isinstance(tensor, Tensor):
                        saved.add(tensor)
            inside = _Storages()
            with inside.saving():
                output = forward(*args, **kwargs)
            largest = max(largest, inside.bytes_beside(resident, saved))
            return output

        return run

    if checkpointing:
        with saved.saving(), wrapped_layers(attachment, wrap):
            loss()
    else:
        with saved.saving():
            loss()
    return saved.bytes_beside(resident) + largest


class _Storages:
    """A set of storages. Holding them prevents the reuse of their addresses."""

    def __init__(self, tensors: Iterator[Tensor] | None = None) -> None:
        self._held: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors or ():
            self.add(tensor)

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._held[storage._cdata] = storage  # also without memory, on the meta device, storages differ in it
        return tensor

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Add what the forward passes within the block save. They have no backward pass."""
        with saved_tensors_hooks(self.add, lambda tensor: tensor):
            yield

    def bytes_beside(self, *others: _Storages) -> int:
        """Return the bytes of the storages that are in none of `others`."""
        known = set().union(*(other._held for other in others))
        return sum(storage.nbytes() for address, storage in self._held.items() if address not in known)
