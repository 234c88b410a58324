"""Layer importance by damping: the change of the loss when the output of a sub-layer is scaled down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from autopeft.evaluators.base import Progress, Request
from autopeft.evaluators.proxies.importance import Branch, Importance
from autopeft.evaluators.proxies.zero_cost import BATCH_SIZE
from autopeft.evaluators.training.record import TrainingFailedError
from autopeft.search_space.architecture import Architecture, Candidate

#: Scale of a damped sub-layer's output: the response suppression factor in the code of the authors.
FACTOR = 0.25
#: Training of a new task head.
HEAD_STEPS = 100
HEAD_LEARNING_RATE = 5e-3


class Damping(Importance):
    """importance = |loss with c scaled by `FACTOR` - loss|, on a few minibatches of the frozen model.

    IST damps the adapters of a model during training and learns from the losses. Here no adapters exist yet, so each
    frozen sub-layer is damped once. With a new task head the loss would not depend on the backbone in a useful way, so
    the head is trained first, alone and briefly (TrainingFailedError if that fails). A language model needs no such
    training. The absolute value is taken because the task also needs a change in a sub-layer whose damping helps.
    """

    name: ClassVar[str] = "damping"
    summary: ClassVar[str] = "adapters where damping a sub-layer moves the loss most"
    source: ClassVar[str] = "after Yao et al. 2024, Layer-wise Importance Matters (IST), response suppression"

    @override
    def measure(self, branches: Sequence[Branch], progress: Progress) -> list[float]:
        evaluator = self.evaluator
        head = self._head()
        with evaluator.attached([Architecture()], [self.seed]) as attachment:
            attachment.eval()
            if head:
                attachment.load_state(dict(head))
            intact = self._loss()
            found: list[float] = []
            for branch in branches:
                module = evaluator.model.get_submodule(branch.exit)
                handle = module.register_forward_hook(lambda module, args, c: FACTOR * c)
                try:
                    found.append(abs(self._loss() - intact))
                finally:
                    handle.remove()
                progress(len(found), len(branches))
            return found

    def _head(self) -> Mapping[str, Tensor]:
        """Return the trained tensors of a new head on the frozen backbone; empty if the model's head is pretrained."""
        evaluator = self.evaluator
        if evaluator.pretrained_head or not evaluator.backbone.head_modules:
            return {}
        training = {
            "learning_rate": HEAD_LEARNING_RATE,
            "batch_size": BATCH_SIZE,
            "epochs": HEAD_STEPS * BATCH_SIZE / len(evaluator.examples["train"]),
        }
        candidate = Candidate(architecture=Architecture(), training=training)
        (outcome,) = evaluator.evaluate([Request(candidate=candidate, seed=self.seed, keep_weights=True)])
        if outcome.weights is None:
            raise TrainingFailedError(f"the task head cannot be trained: {outcome.reason}")
        return outcome.weights

    @torch.no_grad()
    def _loss(self) -> float:
        """Return the mean loss over the examples of the minibatches."""
        evaluator = self.evaluator
        batches = (evaluator.batch("train", indices) for indices in self.minibatches())
        return float(torch.cat([evaluator.task.scores(evaluator.model, batch)["loss"] for batch in batches]).mean())
