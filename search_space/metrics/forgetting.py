"""Forgetting: what a training adds to the loss on rows that are not about its task, the retained rows."""

from __future__ import annotations

from autopeft.search_space.metrics.base import OnOwnRows

#: A negative value is a gain.
FORGETTING = OnOwnRows(
    name="forgetting",
    unit="nats",
    maximise=False,
    summary="loss on the retained rows after the training, minus the loss of the untouched model on the same rows",
)
