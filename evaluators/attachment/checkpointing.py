"""Gradient checkpointing of the layers of a model with adapters.

A checkpointed layer keeps its inputs alone, and runs a second time in the backward pass (Chen et al. 2016, Training
Deep Nets with Sublinear Memory Cost, section 4). transformers' own switch works in training mode only, and a frozen
backbone stays in evaluation mode.

Adapters act inside the layers, and they read more than the inputs of a layer: the random streams of dropout and of
router noise, the gates of a leader, the first pass of X-LoRA. `_Replay` puts them back to where they were, and
afterwards removes every trace of the second run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from autopeft.evaluators.attachment.layers import Forward, without_cache, wrapped_layers

if TYPE_CHECKING:
    from autopeft.evaluators.attachment.attachment import Attachment


@contextmanager
def saving_memory(attachment: Attachment, checkpointing: bool) -> Iterator[None]:
    """Run the model without a key/value cache within the block, and checkpoint its layers if that is wanted."""
    with without_cache(attachment.model[0]), checkpointed(attachment) if checkpointing else nullcontext():
        yield


@contextmanager
def checkpointed(attachment: Attachment) -> Iterator[None]:
    """Checkpoint the layers from the lowest adapter on within the block; passes without gradients stay the same."""

    def wrap(layer: int, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            replay = _Replay(attachment, layer)
            return checkpoint(
                forward,
                *args,
                use_reentrant=False,
                # The backbone's own dropout; the streams of the adapters are the replay's.
                preserve_rng_state=attachment.trains_backbone,
                context_fn=lambda: (nullcontext(), replay),
                **kwargs,
            )

        return run

    with wrapped_layers(attachment, wrap):
        yield


class _Replay:
    """A context in which a layer runs for the second time, from the state that it has now."""

    def __init__(self, attachment: Attachment, layer: int) -> None:
        self._attachment = attachment
        self._routers = [state for _, state, _ in attachment.routers.served]
        self._tokens = attachment.routers.tokens.snapshot() if self._routers else None
        inside = [bank for bank in attachment.banks if bank.site.layer == layer and bank.draws]
        self._streams = [stream for bank in inside for stream in bank.dropout_streams]
        self._states = [stream.get_state() for stream in self._streams]

    def __enter__(self) -> None:
        self._later = [stream.get_state() for stream in self._streams]
        self._last = [router.last for router in self._routers]
        tokens = self._attachment.routers.tokens
        self._tokens_later = tokens.snapshot()
        self._set(self._states)
        if self._tokens is not None:
            tokens.restore(self._tokens)

    def __exit__(self, *error: object) -> None:
        self._set(self._later)
        for router, last in zip(self._routers, self._last, strict=True):
            router.last = last  # penalties count once, and no graph outlives the step
        self._attachment.routers.tokens.restore(self._tokens_later)
        # The second run ends as soon as it has what the backward pass wants, maybe before a tapped input is read.
        self._attachment.taps.clear()

    def _set(self, states: list[torch.Tensor]) -> None:
        for stream, state in zip(self._streams, states, strict=True):
            stream.set_state(state)
