"""Saliencies of the adapters' parameters before training: SNIP, the gradient's norm, Fisher.

Notation: K slots of a pack, M minibatches, P parameters of a candidate's adapters, L the loss of a minibatch.

**The start is jittered.** LoRA's B, a bottleneck's up-projection, a bias start at zero: there gradient x value is zero,
and so is the gradient of what is multiplied with them (LoRA's A). At the true start every LoRA would score 0. So each
tensor of zeros is drawn from a normal distribution of small standard deviation, from a stream of its own name: equal
sites and seeds give equal numbers in any pack. To first order all saliencies of an adapter that starts at zero are
proportional to `JITTER`; only its weight against kinds that start elsewhere (the ones of IA3) depends on it.

Only adapters count, not the task head, which every candidate trains. Dropout is off.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor, nn

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.base import OutOfMemoryError, Request, memory_errors
from autopeft.evaluators.costs.pack_sizing import fitting_slots
from autopeft.evaluators.proxies.zero_cost import BATCH_SIZE, ZeroCost
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.runtime.bank import stream
from autopeft.search_space.sharing import SHARED

#: Standard deviation that stands in for zero: the transformers' own for new weights.
JITTER = 0.02
logger = logging.getLogger(__name__)


class Saliency(ZeroCost):
    """One forward and one backward pass per minibatch and candidate, in packs.

    No adapter, or none that is trained: 0, as little as training can bring there. Training of the backbone itself
    (`full`), what cannot be attached and what is not finite: NaN.
    """

    @abstractmethod
    def score(self, values: Tensor, gradients: Tensor) -> Tensor:
        """Of one candidate, from its parameters [P] and the gradients of L in every minibatch [M, P]."""

    def scores(self, architectures, progress=None):
        found = [math.nan if "full" in architecture.kinds else 0.0 for architecture in architectures]
        trained = [architecture.num_params(self.evaluator.backbone) > 0 for architecture in architectures]
        scored = [i for i, score in enumerate(found) if trained[i] and not math.isnan(score)]
        done = len(architectures) - len(scored)
        for pack in self._packs(architectures, scored):
            for i, score in zip(pack, self._scores([architectures[i] for i in pack]), strict=True):
                found[i] = score
            done += len(pack)
            if progress is not None:
                progress(done, len(architectures))
        return found

    def _packs(self, architectures: Sequence[Architecture], scored: Sequence[int]) -> list[list[int]]:
        """Places of the candidates that run side by side; on a CPU, those that leave the same layers free."""
        evaluator = self.evaluator
        requests = [
            Request(candidate=Candidate(architecture=architectures[i], training={"batch_size": BATCH_SIZE}))
            for i in scored
        ]
        slots = evaluator.pack or fitting_slots(evaluator, requests)

        def depth(i: int) -> int:
            return 0 if evaluator.mixes_depths else architectures[i].lowest_layer(evaluator.backbone)

        groups = [list(group) for _, group in groupby(sorted(scored, key=depth), key=depth)]
        return [group[start : start + slots] for group in groups for start in range(0, len(group), slots)]

    def _scores(self, pack: Sequence[Architecture]) -> list[float]:
        """Of a pack; what does not fit or cannot be attached costs its own score alone."""
        try:
            with memory_errors():
                return self._scores_together(pack)
        except (OutOfMemoryError, ValueError) as error:
            if len(pack) == 1:
                logger.debug("%s: no score for %s: %s", self.name, pack[0].key, error)
                return [math.nan]
            half = len(pack) // 2
            return self._scores(pack[:half]) + self._scores(pack[half:])

    def _scores_together(self, pack: Sequence[Architecture]) -> list[float]:
        evaluator = self.evaluator
        seeds = [self.seed] * len(pack)
        with Attachment(
            evaluator.model, evaluator.backbone, pack, seeds, pretrained_head=evaluator.pretrained_head
        ) as attachment:
            attachment.eval()
            slots = range(len(pack))
            parameters = [parameter for parameter, _ in attachment.trainable()]
            values = {parameter: parameter.detach() for parameter in parameters}
            for k in slots:
                jitter(adapter_parts(attachment, k, values), self.seed)
            gradients: list[list[Tensor]] = [[] for _ in slots]
            for indices in self.minibatches():
                loss = evaluator.scores(attachment, "train", indices)["loss"].mean(1).sum()
                of = dict(zip(parameters, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True))
                for k in slots:
                    gradients[k].append(_flat(adapter_parts(attachment, k, of)))
            found = [self.score(_flat(adapter_parts(attachment, k, values)), torch.stack(gradients[k])) for k in slots]
            return [score if math.isfinite(score) else math.nan for score in torch.stack(found).tolist()]


class Snip(Saliency):
    """Minus the sum of |dL/dp * p| over the parameters p, with the gradient over all minibatches.

    It is the effect of each connection's removal on the loss, to first order, before equation 4 normalises it.
    """

    name: ClassVar[str] = "snip"
    summary: ClassVar[str] = "gradient times value of the adapters' parameters"
    source: ClassVar[str] = "Lee et al. 2019, SNIP, equations 3 and 4; as a sum: Abdelfattah et al. 2021"

    def score(self, values, gradients):
        return -(gradients.mean(0) * values).abs().sum()


class GradNorm(Saliency):
    """Minus the Euclidean norm of the gradient over all minibatches, of all adapters at once.

    The authors add the norms of the layers instead; that counts layers more than gradients.
    """

    name: ClassVar[str] = "grad_norm"
    summary: ClassVar[str] = "norm of the gradient of the adapters"
    source: ClassVar[str] = "Abdelfattah et al. 2021, Zero-Cost Proxies for Lightweight NAS, section 3"

    def score(self, values, gradients):
        return -gradients.mean(0).norm()


class Fisher(Saliency):
    """Minus the sum over p of p^2 F / 2 with F = mean_m (dL_m/dp)^2, the diagonal of the empirical Fisher information.

    It is the effect of each parameter's removal to second order, near a minimum. Theis et al. take the mean over
    examples; here it goes over minibatches, whose gradients are there anyway. Abdelfattah et al. have the same formula
    with activations in place of parameters (Turner et al. 2020), which would not tell the adapters from the backbone.
    """

    name: ClassVar[str] = "fisher"
    summary: ClassVar[str] = "Fisher information of the adapters' parameters"
    source: ClassVar[str] = "Theis et al. 2018, Faster Gaze Prediction with Dense Networks and Fisher Pruning"

    def score(self, values, gradients):
        return -(gradients * values).square().mean(0).sum() / 2


def adapter_parts(attachment: Attachment, k: int, of: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
    """`Attachment.parts` of slot k without the head's."""
    sites = {site for site, _ in attachment.architectures[k]}
    return {
        name: part
        for name, part in attachment.parts(k, of).items()
        if name.startswith(SHARED) or name.partition("/")[0] in sites
    }


def jitter(parts: Mapping[str, Tensor], seed: int) -> None:
    """Draws every tensor of zeros anew, in place; see the top of this file."""
    for name, part in parts.items():
        if not part.any():
            part.copy_(JITTER * torch.randn(part.shape, generator=stream(seed, name, "jitter")))


def _flat(parts: Mapping[str, Tensor]) -> Tensor:
    """[P]"""
    return torch.cat([part.reshape(-1) for part in parts.values()])
