"""The acquisition function of the goal "cheapest_as_good": a cheaper point that is as good as the best, or a new best.

Notation: n trials, r baseline points, b points to score, s samples.
"""

from __future__ import annotations

from math import inf

import torch
from botorch.models import SingleTaskGP
from botorch.utils.sampling import draw_sobol_normal_samples
from torch import Tensor

from autopeft.searchers.bo.acquisition import TINY, Conditional, Posterior, excess

#: Joint samples of the losses at trials and pending points.
SAMPLES = 64


class CheapestAsGood:
    """The expected saving of the cheapest point that is as good as the best, exact given the sampled losses.

    The trials are noisy, so it is random which of them is the best, and which ones are within the margin of it: the
    losses at trials and pending points are sampled jointly. Given a sample, a point is worth

        P(loss <= best + margin) max(0, log(cost of the cheapest one so far) - log(its cost))
          + E[max(0, best - loss)] / margin

    The first term is the constrained expected improvement of Gardner et al. 2014 for a cost that is known. The second
    one is the expected improvement of the best itself (Letham et al. 2019, noisy): a gain of one margin is worth as
    much as a cost that is lower by a factor of e. So a search first finds out how good the best is, and then what can
    be left out.
    """

    def __init__(
        self,
        model: SingleTaskGP,
        baseline: Tensor,
        log_costs: Tensor,
        margin: float,
        seed: int,
        bound: float = inf,
    ) -> None:
        """Condition on the points `baseline` [r, .] with `log_costs` [r].

        `margin`, `bound`: in the unit of the model's loss; a loss above the bound is never as good.
        """
        self.margin = margin
        normal = draw_sobol_normal_samples(len(baseline), SAMPLES, dtype=torch.double, seed=seed)
        posterior = Posterior.of(model)
        losses = posterior.joint(baseline, normal)
        self.best = losses.amin(1, keepdim=True)
        self.worst = (self.best + margin).clamp_max(bound)
        as_good = losses <= self.worst
        # Where the bound rules all out, a saving counts from the dearest one.
        self.cheapest = torch.where(as_good, log_costs, log_costs.max()).amin(1, keepdim=True)
        self.conditional = Conditional.of(posterior, baseline, losses)

    def __call__(self, inputs: Tensor, log_costs: Tensor) -> Tensor:
        """Return the logarithm of the expected worth [b] of inputs [b, .] with `log_costs` [b]."""
        mean, deviation = self.conditional(inputs)
        saving = (self.cheapest - log_costs).clamp_min(0.0)
        as_good = torch.special.ndtr((self.worst - mean) / deviation)
        gain = excess(-mean, deviation.expand_as(mean), -self.best.expand_as(mean))
        worth: Tensor = (as_good * saving + gain / self.margin).mean(0)
        return worth.clamp_min(TINY).log()
