"""Saliencies of the adapters' parameters before training: SNIP, gradient norm, Fisher.

Notation: K slots of a pack, M minibatches, P parameters of a candidate's adapters, L the loss of a minibatch.

**The initial values are jittered.** LoRA's B, the up-projection of a bottleneck and biases start at zero: there,
gradient x value is zero, and so is the gradient of the factor that multiplies them (LoRA's A). At the true initial
values every LoRA would score 0. So each tensor of zeros is drawn from a normal distribution of small standard
deviation, from a random stream named after the tensor: equal sites and seeds give equal numbers in any pack. To first
order, all saliencies of an adapter that starts at zero are proportional to `JITTER`; only their scale relative to types
with other initial values (the ones of IA3) depends on it.

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
from typing_extensions import override

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.base import OutOfMemoryError, Progress, Request, memory_errors
from autopeft.evaluators.costs.pack_sizing import fitting_slots
from autopeft.evaluators.proxies.zero_cost import BATCH_SIZE, ZeroCost
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.runtime.init import stream
from autopeft.search_space.sharing import SHARED

#: Standard deviation of the jitter: that of new weights in transformers.
JITTER = 0.02
logger = logging.getLogger(__name__)


class Saliency(ZeroCost):
    """One forward and one backward pass per minibatch and candidate, in packs.

    The score is 0 for an architecture without trainable adapters, and NaN for training of the backbone itself
    (`full`), for an architecture that cannot be attached, and if it is not finite.
    """

    @abstractmethod
    def score(self, values: Tensor, gradients: Tensor) -> Tensor:
        """Return the score of a candidate, a scalar, from parameters [P] and gradients of L per minibatch [M, P]."""

    @override
    def scores(self, architectures: Sequence[Architecture], progress: Progress | None = None) -> list[float]:
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
        """Return packs of indices of architectures; on a CPU, those of a pack have the same lowest adapted layer."""
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
        """Return the scores of a pack; only those that do not fit or cannot be attached are NaN."""
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
        with evaluator.attached(pack, seeds) as attachment:
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
    """Minus the sum of |dL/dp * p| over the parameters p, with the gradient averaged over all minibatches.

    It is the first-order effect of the removal of each parameter on the loss, without the normalisation of equation 4.
    """

    name: ClassVar[str] = "snip"
    summary: ClassVar[str] = "gradient times value of the adapters' parameters"
    source: ClassVar[str] = "Lee et al. 2019, SNIP, equations 3 and 4; as a sum: Abdelfattah et al. 2021"

    @override
    def score(self, values: Tensor, gradients: Tensor) -> Tensor:
        return -(gradients.mean(0) * values).abs().sum()


class GradNorm(Saliency):
    """Minus the Euclidean norm of the gradient of all adapters, averaged over all minibatches.

    The authors add the norms of the layers instead, which depends on the number of layers more than on the gradients.
    """

    name: ClassVar[str] = "grad_norm"
    summary: ClassVar[str] = "norm of the gradient of the adapters"
    source: ClassVar[str] = "Abdelfattah et al. 2021, Zero-Cost Proxies for Lightweight NAS, section 3"

    @override
    def score(self, values: Tensor, gradients: Tensor) -> Tensor:
        norm: Tensor = gradients.mean(0).norm()
        return -norm


class Fisher(Saliency):
    """Minus the sum over p of p^2 F / 2 with F = mean_m (dL_m/dp)^2, the diagonal of the empirical Fisher information.

    It is the second-order effect of the removal of each parameter, near a minimum. Theis et al. take the mean over
    examples; here it is over minibatches, whose gradients are available anyway. Abdelfattah et al. use the same formula
    with activations in place of parameters (Turner et al. 2020), which would not separate adapters from the backbone.
    """

    name: ClassVar[str] = "fisher"
    summary: ClassVar[str] = "Fisher information of the adapters' parameters"
    source: ClassVar[str] = "Theis et al. 2018, Faster Gaze Prediction with Dense Networks and Fisher Pruning"

    @override
    def score(self, values: Tensor, gradients: Tensor) -> Tensor:
        return -(gradients * values).square().mean(0).sum() / 2


def adapter_parts(attachment: Attachment, k: int, of: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
    """Return `Attachment.parts` of slot k without the task head."""
    sites = {site for site, _ in attachment.architectures[k]}
    return {
        name: part
        for name, part in attachment.parts(k, of).items()
        if name.startswith(SHARED) or name.partition("/")[0] in sites
    }


def jitter(parts: Mapping[str, Tensor], seed: int) -> None:
    """Fill every tensor of zeros with random values, in place; see the top of this file."""
    for name, part in parts.items():
        if not part.any():
            part.copy_(JITTER * torch.randn(part.shape, generator=stream(seed, name, "jitter")))


def _flat(parts: Mapping[str, Tensor]) -> Tensor:
    """Return all parts as one vector [P]."""
    return torch.cat([part.reshape(-1) for part in parts.values()])
