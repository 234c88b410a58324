"""Gates: the largest shared weights, trained jointly with a distribution over the values of every gene.

Notation: V values of a gene, A alternatives of an adapter at a site (combinations of values of its genes), M tokens.

Each gene has a distribution of `decisions.py`, with its notation: gates h_j, their products z_j, weights w: [V].

In training, gates are sampled with the sigmoid of their logits as probabilities, and types with the softmax, so that
less likely types are trained too. TAPS thresholds instead. But the derivative at an open gate does not measure the
value of the adapter: it is zero at the minimum of the adapter's weights, and positive while they fluctuate around it,
so that gates would close without any penalty. Sampled gates are evaluated at both ends: at equal probabilities by
(d(0) + d(1)) / 2, the trapezoidal rule for the change of the loss.

The weight of an alternative is the product of the weights of its gates and of its values. With Y_a for the output of
alternative a, given the site's output y, the gated output is

    y + sum over a of w_a (Y_a - y),

for nested sizes y + sum over j of z_j (Y_j - Y_(j-1)), Y_0 = y. If one weight is one, this is the function of that
adapter, of any type, so the forward pass is exact; the derivative in a weight is that of scaling the adapter's change
of its input or output. The keys and values of a prefix are neither, so `Gates` rejects a prefix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product

import torch
from torch import Generator, Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from typing_extensions import override

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.shared_weights import SharedWeights
from autopeft.evaluators.base import Progress
from autopeft.evaluators.proxies.base import Proxy
from autopeft.evaluators.proxies.decisions import Decision, decisions_of
from autopeft.evaluators.training import batching
from autopeft.evaluators.training.optimizer import FACTOR, parameter_groups
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.record import TrainingFailedError
from autopeft.evaluators.training.schedule import rate
from autopeft.search_space.adapters import ADAPTERS, AdapterSpec
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.domains import Domain
from autopeft.search_space.runtime.bank import Bank
from autopeft.search_space.runtime.init import stream
from autopeft.search_space.spaces.genes import TRAINING, Assignment
from autopeft.search_space.spaces.location import locate
from autopeft.search_space.spaces.placement import Placement
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.search_space.training import Training

#: Share of the steps before the gates are trained: adapters that start as the identity have no effect yet.
GATE_DELAY = 0.25
#: Approximate total change that a logit can make, for any number of steps: enough to close an open gate.
LOGIT_RANGE = 4.0


class GatedBank(Bank):
    """The alternatives of one adapter at one site: A slots over the same shared weights, summed to one output."""

    #: Weights [A] of the alternatives in the current step.
    weights: Tensor

    @override
    def apply_input(self, x: Tensor) -> Tensor:
        base = x.to(self.dtype)
        return self._mixed(base, super().apply_input(self._expanded(base))).to(x.dtype)

    @override
    def apply_linear(self, x: Tensor, slots: Tensor | None) -> Tensor | None:
        return None

    @override
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        base = y.to(self.dtype)
        changed = super().forward(self._expanded(x.to(self.dtype)), self._expanded(base))
        return self._mixed(base, changed).to(y.dtype)

    def _expanded(self, tensor: Tensor) -> Tensor:
        """Return a view [A, M, D] of a tensor [1, M, D]."""
        return tensor.expand(len(self.specs), -1, -1)

    def _mixed(self, base: Tensor, changed: Tensor) -> Tensor:
        """Return base [1, M, D] plus the weighted changes [A, M, D]."""
        # Differences first: the change of a small adapter would be lost in the rounding of a sum with y.
        return base + (self.weights.to(base) @ (changed - base).flatten(1)).view_as(base)


@dataclass(slots=True)
class _Family:
    """Adapters that depend on the same genes: `gates`, each with the index of the value that it needs, and `genes`.

    An alternative is a combination of values of `genes`, in the order of `product`. `costs`: parameters of each
    alternative at all sites, [A]. `banks`: each with the indices of its alternatives, which have the same structure.
    """

    gates: tuple[tuple[str, int], ...]
    genes: tuple[str, ...]
    costs: Tensor
    banks: list[tuple[GatedBank, Tensor]] = field(default_factory=list)

    def weigh(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Set the weights of the banks from those of the genes; return the number of active parameters, a scalar."""
        joint = self.costs.new_ones(1)
        for gene in self.genes:
            joint = (joint[:, None] * weights[gene]).flatten()
        for gene, index in self.gates:
            joint = joint * weights[gene][index, None]
        for bank, alternatives in self.banks:
            bank.weights = joint[alternatives]
        return (joint * self.costs).sum()


class GatedAttachment(Attachment):
    """All adapters of a space and the task head, attached to one model. Call `weigh` before a forward pass."""

    def __init__(
        self,
        evaluator: PackedEvaluator,
        space: SearchSpace,
        decisions: Mapping[str, Decision],
        shared: SharedWeights,
        seed: int,
    ) -> None:
        families, banks = _gated(evaluator, space, decisions, shared, seed)
        super().__init__(evaluator.model, evaluator.backbone, [Architecture()], [seed], shared=shared)
        self._unhook()
        for bank in banks:
            self._add(bank, [0])
        self._families = families
        layers = (0 if bank.site.layer is None else bank.site.layer for bank in banks)
        self.depth = min(layers, default=self.depth)
        self.to(evaluator.device)
        self._hook(evaluator.model)
        self.train()

    def weigh(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Set the weights [V] of every gene, by name; return the number of active parameters, a scalar."""
        return torch.stack([family.weigh(weights) for family in self._families]).sum()

    def __enter__(self) -> GatedAttachment:
        return self


def _gated(
    evaluator: PackedEvaluator,
    space: SearchSpace,
    decisions: Mapping[str, Decision],
    shared: SharedWeights,
    seed: int,
) -> tuple[list[_Family], list[GatedBank]]:
    """Return the adapters of a space, grouped by the genes that they depend on, and banks in `Attachment`'s order."""
    families: dict[tuple[object, ...], _Family] = {}
    readers: dict[tuple[object, ...], list[list[Placement]]] = {}
    banks: list[tuple[tuple[int, int, str], GatedBank]] = []
    kinds, device = list(ADAPTERS), evaluator.device
    for place in space.placements:
        site, genes = place.site, tuple(place.genes.values())
        gates = tuple((gate.gene, decisions[gate.gene].index(gate.value)) for gate in place.gates)
        combinations = product(*(decisions[gene].values for gene in genes))
        specs = [place.spec(dict(zip(genes, values, strict=True))) for values in combinations]
        zeros = torch.zeros(len(specs), device=device)
        family = families.setdefault((gates, genes), _Family(gates, genes, zeros))
        family.costs += torch.tensor([float(spec.num_params(site)) for spec in specs], device=device)
        for structure in dict.fromkeys(spec.structure() for spec in specs):
            nth = _number(place, readers.setdefault((site.name, structure), []))
            alternatives = [a for a, spec in enumerate(specs) if spec.structure() == structure]
            slots = [specs[a] for a in alternatives]
            # One seed: the alternatives have the same dropout masks.
            seeds = [f"{seed}#{nth}" if nth else seed] * len(slots)
            base, of = evaluator.model.get_submodule(site.module), shared.bank(site, structure, nth)
            bank = GatedBank(site, slots, base, seeds, [0] * len(slots), of)
            family.banks.append((bank, torch.tensor(alternatives, device=device)))
            banks.append(((space.backbone.sites.index(site), kinds.index(place.kind), repr((structure, nth))), bank))
    return list(families.values()), [bank for _, bank in sorted(banks, key=lambda pair: pair[0])]


def _number(place: Placement, readers: list[list[Placement]]) -> int:
    """Return the number of the bank that a placement reads, among those of its structure at its site.

    `readers`: the placements that read each bank, to which this one is added. Mutually exclusive placements share a
    number, as in `Attachment`.
    """
    for nth, others in enumerate(readers):
        if all(map(place.excludes, others)):
            others.append(place)
            return nth
    readers.append([place])
    return len(readers) - 1


class Gates(Proxy):
    """See the top of this file: call `train` once, then `chosen`; with several penalties, call `sweep`.

    Loss: that of the task, plus `penalty` times the active parameters as a share of those of the largest architecture.
    AdamW minimises it, with the learning rate of `training` for the weights and a separate one, on the same schedule,
    for the logits. Searched training fields are ignored, and a field with a continuous domain is fixed at its middle.
    Raises ValueError for a space with a prefix or a mixture, and for a space that `SharedWeights` rejects.

    TAPS (Wallingford et al. 2022) has one such gate per layer; Single-Path NAS (Stamoulis et al. 2019) has one per
    nested size, with a threshold on the norm of the weights that the size adds in place of a logit.
    """

    name = "gates"
    summary = "log-likelihood under gates that are trained with the weights"
    source = "Wallingford et al. 2022, TAPS; nested sizes: Stamoulis et al. 2019, Single-Path NAS"

    def __init__(
        self,
        evaluator: PackedEvaluator,
        space: SearchSpace,
        training: Training,
        seed: int,
        penalty: float,
    ) -> None:
        self.evaluator = evaluator
        self.space = space
        self.training = training
        self.seed = seed
        self.penalty = penalty
        self.weights = SharedWeights(
            evaluator.model, space, seed=seed, pretrained_head=evaluator.pretrained_head, starts=evaluator.starts
        )
        for name, choice in space.adapters.items():
            adapter = ADAPTERS[choice.kind]
            if adapter.apply is AdapterSpec.apply and adapter.apply_input is AdapterSpec.apply_input:
                reason = f"{choice.kind!r} changes neither the input nor the output of a module"
                raise ValueError(f"the score `gates` does not support the adapter {name!r}: {reason}")
            if "experts" in choice.fields:
                raise ValueError(f"the score `gates` does not support the adapter {name!r}: it is a mixture of experts")
        for key, pool in self.weights.pools.items():
            if pool.trainable:
                reason = "its sites share trainable parameters, so its size is not a sum over sites"
                raise ValueError(f"the score `gates` does not support adapters of type {key.kind!r}: {reason}")
        self.decisions = dict(decisions_of(space, evaluator.device))

    def attach(self) -> GatedAttachment:
        """Return a context manager that attaches all adapters with their gates to the model."""
        return GatedAttachment(self.evaluator, self.space, self.decisions, self.weights, self.seed)

    def value_weights(self, noise: Generator | None = None) -> dict[str, Tensor]:
        """Return the weights [V] of every gene; see `Decision.weights`."""
        return {gene: decision.weights(noise) for gene, decision in self.decisions.items()}

    def train(self, num_steps: int, progress: Progress | None = None) -> list[float]:
        """Train weights and gates for `num_steps` steps; return the loss of the task at each.

        Raises TrainingFailedError if a loss is not finite.
        """
        evaluator, training = self.evaluator, self.training
        parameters = list(self.weights.trainable())
        shares = [rate(step, num_steps, training) for step in range(num_steps)]
        delayed = [0.0 if step < GATE_DELAY * num_steps else share for step, share in enumerate(shares)]
        rates = [training.learning_rate * share for share in shares]
        gate_rates = [LOGIT_RANGE * share / (sum(delayed) or 1.0) for share in delayed]
        logits = [decision.logits for decision in self.decisions.values()]
        groups = [
            {**group, "rates": [now * group.get(FACTOR, 1.0) for now in rates]}
            for group in parameter_groups(parameters, training, self.weights.rate_factors())
        ]
        if logits:
            groups.append({"params": logits, "weight_decay": 0.0, "rates": gate_rates})
        optimizer = AdamW(groups)
        largest = self.space.decode(self.space.largest()).architecture.num_params(evaluator.backbone)
        noise = stream(self.seed, "gates")
        order = batching.training_batches(evaluator.lengths["train"], training.batch_size, self.seed)
        losses: list[float] = []
        with self.attach() as attachment:
            for step, indices in enumerate(islice(order, num_steps)):
                for group in optimizer.param_groups:
                    group["lr"] = group["rates"][step]
                share = attachment.weigh(self.value_weights(noise)) / max(1, largest)
                loss = evaluator.scores(attachment, "train", indices)["loss"].mean()
                (loss + self.penalty * share).backward()
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise TrainingFailedError(
                        f"the loss with gates became {losses[-1]} at step {step + 1} of {num_steps}"
                    )
                if training.max_grad_norm:
                    clip_grad_norm_([p for p, _ in parameters], training.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                if progress is not None:
                    progress(step + 1, num_steps)
        return losses

    def chosen(self) -> Assignment:
        """Return the likeliest values of the genes: gates thresholded at 1/2, the likeliest type.

        Searched training fields have the values with which the gates were trained, or the middle of their domain.
        """
        values = {gene: decision.value() for gene, decision in self.decisions.items()}
        for key, domain in self.space.training.items():
            if isinstance(domain, Domain) and domain.contains(value := getattr(self.training, key)):
                values[TRAINING + key] = value
        return self.space.completed(values)

    def sweep(self, penalties: Sequence[float], num_steps: int, progress: Progress | None = None) -> list[Assignment]:
        """Return the assignments that gates choose, trained anew with each of `penalties`, without duplicates."""
        found: dict[Architecture, Assignment] = {}
        for run, penalty in enumerate(penalties):
            gates = Gates(self.evaluator, self.space, self.training, self.seed, penalty)
            gates.train(num_steps, _part(progress, run * num_steps, len(penalties) * num_steps))
            assignment = gates.chosen()
            found.setdefault(self.space.decode(assignment).architecture, assignment)
        return list(found.values())

    @torch.no_grad()
    @override
    def scores(self, architectures: Sequence[Architecture], progress: Progress | None = None) -> list[float]:
        """Return minus the log-likelihood of the genes (of `locate`) of each architecture; NaN outside the space."""
        logs = {gene: decision.probabilities().log().tolist() for gene, decision in self.decisions.items()}
        scores = []
        for number, architecture in enumerate(architectures, 1):
            genes = locate(self.space, Candidate(architecture=architecture))
            if genes is None:
                scores.append(math.nan)
            else:
                terms = (logs[gene][self.decisions[gene].index(value)] for gene, value in genes.items() if gene in logs)
                scores.append(-math.fsum(terms))
            if progress is not None:
                progress(number, len(architectures))
        return scores


def _part(progress: Progress | None, done: int, of: int) -> Progress | None:
    """Return a callback that reports one of several runs as part of the whole."""
    return None if progress is None else lambda step, _: progress(done + step, of)
