"""Quality metrics that are means of a column of the task."""

from __future__ import annotations

from autopeft.search_space.metrics.base import PerExample

ACCURACY = PerExample(
    name="accuracy",
    unit="share",
    maximise=True,
    bound=1.0,
    worst=0.0,
    summary="correct validation examples (of several labels: all of them), or an example's correct completion tokens",
    expression="accuracy_score(targets, predictions)",
)
LOSS = PerExample(
    name="loss",
    unit="nats",
    maximise=False,
    bound=0.0,
    summary="validation cross-entropy per example (several labels: mean over labels; causal: over completion tokens)",
)
