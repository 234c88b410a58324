"""Layer importance by damping: a sub-layer matters as much as the loss moves when it speaks more softly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.base import Request
from autopeft.evaluators.proxies.importance import Importance
from autopeft.evaluators.proxies.zero_cost import BATCH_SIZE
from autopeft.evaluators.training.record import TrainingFailedError
from autopeft.search_space.architecture import Architecture, Candidate

#: What is left of a damped sub-layer's output: the response suppression factor of the authors' code.
FACTOR = 0.25
#: Of the head's training.
HEAD_STEPS = 100
HEAD_LEARNING_RATE = 5e-3


class Damping(Importance):
    """importance = |loss with c scaled by `FACTOR` - loss|, on a few minibatches of the frozen model.

    IST damps the adapters of a model in training and learns from the losses; here there are no adapters yet, so the
    frozen sub-layers are damped, each once. Behind a new task head the loss would say nothing of the backbone: such a
    head is trained first, alone and briefly (TrainingFailedError where that fails).
    A language model's loss counts as it is.
    The absolute value, because a sub-layer whose damping helps is one that the task wants changed, too.
    """

    name: ClassVar[str] = "damping"
    summary: ClassVar[str] = "adapters where damping a sub-layer moves the loss most"
    source: ClassVar[str] = "after Yao et al. 2024, Layer-wise Importance Matters (IST), response suppression"

    def measure(self, branches, progress):
        evaluator = self.evaluator
        head = self._head()
        with Attachment(
            evaluator.model,
            evaluator.backbone,
            [Architecture()],
            [self.seed],
            pretrained_head=evaluator.pretrained_head,
        ) as attachment:
            attachment.eval()
            if head:
                attachment.load_state(dict(head))
            intact = self._loss()
            found = []
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
        """Trained tensors of a head on the frozen backbone; none where the model's own will do."""
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
        """Mean over the examples of the minibatches."""
        evaluator = self.evaluator
        batches = (evaluator.batch("train", indices) for indices in self.minibatches())
        return float(torch.cat([evaluator.task.scores(evaluator.model, batch)["loss"] for batch in batches]).mean())
