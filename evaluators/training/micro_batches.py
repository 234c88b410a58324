"""A training step on parts of its minibatch, whose gradients add up to those of the whole.

The loss of a slot is the mean over the examples, so a part counts by its number of examples. Parts keep the padding of
the minibatch, and dropout draws for the whole of it: an example has the same mask in every part. Where that is not
enough, `divisible` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Generator, Tensor

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.search_space.runtime.bank import Part

#: Computes the losses [K, n] of n examples, the given part of a minibatch.
Losses = Callable[[slice], Tensor]


def add_gradients(
    losses: Losses, attachment: Attachment, examples: int, rows: int | None = None, backward: bool = True
) -> Tensor:
    """Add the gradients of a minibatch's losses, `rows` examples at a time; return the losses [K], detached.

    `examples`: of the minibatch. `rows` None: all at a time. Without `backward`, only the losses are computed.
    """
    if rows is None or rows >= examples:
        return _added(losses(slice(None)).mean(1), attachment, backward)
    banks = [bank for bank in attachment.banks if bank.draws]
    states = [[stream.get_state() for stream in bank.dropout_streams] for bank in banks]
    parts = [Part(first, min(rows, examples - first), examples) for first in range(0, examples, rows)]
    found: list[Tensor] = []
    try:
        for part in parts:
            for bank, before in zip(banks, states, strict=True):
                bank.part = part
                _set_states(bank.dropout_streams, before)  # every part draws for the whole minibatch
            of_part = losses(slice(part.first, part.first + part.examples)).sum(1) / examples
            found.append(_added(of_part, attachment, backward))
    finally:
        for bank in banks:
            bank.part = None
    return sum(found[1:], found[0])


def _added(losses: Tensor, attachment: Attachment, backward: bool) -> Tensor:
    penalised = attachment.routers.penalised(losses).sum()
    if backward:
        penalised.backward()
    return losses.detach()


def _set_states(streams: Sequence[Generator], states: Sequence[Tensor]) -> None:
    for stream, state in zip(streams, states, strict=True):
        stream.set_state(state)
