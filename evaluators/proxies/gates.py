"""Gates: shared weights at their largest and, trained with them, what every gene of the architecture decides.

Notation: V values of a gene, A alternatives of an adapter at a site (combinations of values of its genes), M tokens.

A gene has a weight per value, w: [V], one for the value that it takes and zero for the others:

- on or off, and a size l_1 < ... < l_V, by nested gates: gate h_j is 1 or 0, z_j = h_2 ... h_j (and z_1 = 1) keeps size
  l_j only if all below are kept, w_j = z_j - z_(j+1);
- a type, and a field without an order, by the largest of V logits.

In training, gates are drawn with the probability that the sigmoid of their logit says, and types with that of the
softmax; members that are behind are trained all the same. TAPS thresholds instead. But the derivative at an open gate
does not see what the adapter is worth: it is zero in the minimum of the adapter's own weights, and positive as long as
they hover around it, so that gates close without any penalty. Drawn, they are judged from both ends: at even odds by
(d(0) + d(1)) / 2, the trapezoidal rule for the change of the loss.

Backward, h has the derivative of the logit's sigmoid, and a type that of the softmax (straight-through). An
alternative weighs the product of the weights of its gates and of its values. With Y_a for what it makes of an output y,
the site has

    y + sum over a of w_a (Y_a - y),

for nested sizes y + sum over j of z_j (Y_j - Y_(j-1)), Y_0 = y. That is an adapter's own function, whatever it is, as
soon as one weight is one, so the forward pass is exact; its derivative in a weight is that of fading the adapter's
change of its input or output in and out. Keys and values of a prefix are neither, and are refused.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.shared_weights import SharedWeights
from autopeft.evaluators.base import Progress
from autopeft.evaluators.proxies.base import Proxy
from autopeft.evaluators.training import batching
from autopeft.evaluators.training.optimizer import decay_groups
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.record import TrainingFailedError
from autopeft.evaluators.training.schedule import rate
from autopeft.search_space.adapters import ADAPTERS, AdapterSpec
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.domains import BOOLEAN, Choice, Domain, Float, Value
from autopeft.search_space.runtime.bank import Bank, stream
from autopeft.search_space.spaces.genes import TRAINING, Assignment
from autopeft.search_space.spaces.location import locate
from autopeft.search_space.spaces.placement import Placement
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.search_space.training import Training

#: Sizes of a range of whole numbers that have gates, at most: a step computes each of them.
MOST_LEVELS = 8
#: The logit of an open gate at the start, and that of the type in the largest architecture; other types have 0.
OPEN = 2.0
#: Share of the steps in which the gates stay as they are: adapters that start as the identity have nothing to show yet.
HELD = 0.25
#: How far a logit can go in all, about, however long the training: far enough to close what starts open.
REACH = 4.0


def nested(opens: Tensor) -> Tensor:
    """Weights [V] of values of which each but the first stands behind a gate: opens [V - 1]."""
    kept = torch.cat([opens.new_ones(1), opens]).cumprod(0)
    return kept - torch.cat([kept[1:], kept.new_zeros(1)])


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, the derivative of `soft` (Bengio et al. 2013, Estimating or Propagating Gradients)."""
    return hard + (soft - soft.detach())


class Decision:
    """One gene: `values`, in order where `ordered`, and the logits [V - 1] of their gates, else [V] of their own."""

    def __init__(self, values: Sequence[Value], ordered: bool, start: Value, device: torch.device) -> None:
        self.values = tuple(values)
        self.ordered = ordered
        logits = [OPEN] * (len(self.values) - 1) if ordered else [OPEN * (value == start) for value in self.values]
        self.logits = nn.Parameter(torch.tensor(logits, device=device))

    def index(self, value: Value) -> int:
        """The place of a value; of a size between two gates, that of the upper one."""
        if self.ordered:
            return min(bisect_left(self.values, value), len(self.values) - 1)
        return self.values.index(value)

    def probabilities(self) -> Tensor:
        """[V]: of independent gates, or of one draw."""
        return nested(self.logits.sigmoid()) if self.ordered else self.logits.softmax(0)

    def weights(self, noise: Generator | None = None) -> Tensor:
        """[V], one of them 1: drawn with `noise`, else at the thresholded gates, or of the likeliest type."""
        logits = self.logits.detach()
        if self.ordered:
            level = 0.5 if noise is None else torch.rand(len(logits), generator=noise).to(logits)
            return nested(straight_through((logits.sigmoid() > level).to(logits), self.logits.sigmoid()))
        if noise is not None:
            logits = logits - torch.empty(len(logits)).exponential_(generator=noise).log().to(logits)
        return straight_through(F.one_hot(logits.argmax(), len(logits)).to(logits), self.logits.softmax(0))

    @torch.no_grad()
    def value(self) -> Value:
        return self.values[int(self.weights().argmax())]


class GatedBank(Bank):
    """The alternatives of one adapter at one site: A slots over the same shared weights, which act as a single one."""

    #: [A], of the step.
    weights: Tensor

    def apply_input(self, x):
        own = x.to(self.dtype)
        return self._mixed(own, super().apply_input(self._each(own))).to(x.dtype)

    def apply_linear(self, x, slots):
        return None

    def forward(self, x, y):
        own = y.to(self.dtype)
        return self._mixed(own, super().forward(self._each(x.to(self.dtype)), self._each(own))).to(y.dtype)

    def _each(self, tensor: Tensor) -> Tensor:
        """[1, M, D] to [A, M, D]."""
        return tensor.expand(len(self.specs), -1, -1)

    def _mixed(self, own: Tensor, each: Tensor) -> Tensor:
        # The differences first: beside y, what a small adapter changes is lost in the rounding of a sum.
        return own + (self.weights.to(own) @ (each - own).flatten(1)).view_as(own)


@dataclass(slots=True)
class _Family:
    """Adapters about which the same genes decide: `gates` with the place of the value that each needs, and `genes`.

    An alternative is a combination of values of `genes`, in the order of `product`. `costs`: its parameters at all
    sites, [A]. `banks`: each with the alternatives, of one structure, that are its slots.
    """

    gates: tuple[tuple[str, int], ...]
    genes: tuple[str, ...]
    costs: Tensor
    banks: list[tuple[GatedBank, Tensor]] = field(default_factory=list)

    def weigh(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Sets the weights of the banks from those of the genes; returns the parameters that are on, a scalar."""
        joint = self.costs.new_ones(1)
        for gene in self.genes:
            joint = (joint[:, None] * weights[gene]).flatten()
        for gene, place in self.gates:
            joint = joint * weights[gene][place, None]
        for bank, alternatives in self.banks:
            bank.weights = joint[alternatives]
        return (joint * self.costs).sum()


class GatedAttachment(Attachment):
    """Every adapter of a space, and the task head, on one model. Call `weigh` before the model runs."""

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
        """Sets the weights [V] of every gene by its name; returns the number of parameters that are on, a scalar."""
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
    """The adapters of a space, by what decides about them, and in the order in which `Attachment` lets them act."""
    families: dict[tuple[object, ...], _Family] = {}
    readers: dict[tuple[object, ...], list[list[Placement]]] = {}
    banks: list[tuple[tuple[int, int, str], GatedBank]] = []
    kinds, device = list(ADAPTERS), evaluator.device
    for place in space.placements:
        site, genes = place.site, tuple(place.genes.values())
        gates = tuple((gate.gene, decisions[gate.gene].index(gate.value)) for gate in place.gates)
        combinations = product(*(decisions[gene].values for gene in genes))
        specs = [place.spec(dict(zip(genes, values, strict=True))) for values in combinations]
        none = torch.zeros(len(specs), device=device)
        family = families.setdefault((gates, genes), _Family(gates, genes, none))
        family.costs += torch.tensor([float(spec.num_params(site)) for spec in specs], device=device)
        for structure in dict.fromkeys(spec.structure() for spec in specs):
            nth = _number(place, readers.setdefault((site.name, structure), []))
            alternatives = [a for a, spec in enumerate(specs) if spec.structure() == structure]
            own = [specs[a] for a in alternatives]
            # One seed: the alternatives differ in what they do and not in their dropout.
            seeds = [f"{seed}#{nth}" if nth else seed] * len(own)
            base, of = evaluator.model.get_submodule(site.module), shared.bank(site, structure, nth)
            bank = GatedBank(site, own, base, seeds, [0] * len(own), of)
            family.banks.append((bank, torch.tensor(alternatives, device=device)))
            banks.append(((space.backbone.sites.index(site), kinds.index(place.kind), repr((structure, nth))), bank))
    return list(families.values()), [bank for _, bank in sorted(banks, key=lambda pair: pair[0])]


def _number(place: Placement, readers: list[list[Placement]]) -> int:
    """Which bank of its structure at its site a place reads, given the readers of each, to which it is added.

    As `Attachment` counts: those that exclude each other are both the first.
    """
    gates = {gate.gene: gate.value for gate in place.gates}
    for nth, others in enumerate(readers):
        if all(any(gates.get(g.gene, g.value) != g.value for g in other.gates) for other in others):
            others.append(place)
            return nth
    readers.append([place])
    return len(readers) - 1


class Gates(Proxy):
    """See the top of this file: `train` once, then `chosen`; with several penalties, `sweep`.

    Loss: the task's, plus `penalty` times the parameters that are on, as a share of the largest architecture's. AdamW
    minimises it, the weights with the rate of `training`, the logits with one of their own on the same schedule. What
    is searched beside the architecture has no part in it, and a field with a continuous domain has its middle. Raises
    ValueError for a space with a prefix, and where `SharedWeights` does.

    TAPS (Wallingford et al. 2022) has one such gate per layer; Single-Path NAS (Stamoulis et al. 2019) has one per
    nested size, with a threshold on the norm of what the size adds in place of a logit.
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
        self.weights = SharedWeights(evaluator.model, space, seed=seed, pretrained_head=evaluator.pretrained_head)
        for name, choice in space.adapters.items():
            own = ADAPTERS[choice.kind]
            if own.apply is AdapterSpec.apply and own.apply_input is AdapterSpec.apply_input:
                kind = f"it is of kind {choice.kind!r}, which changes neither an input nor an output"
                raise ValueError(f"there is no gate for the adapter {name!r}: {kind}")
            if "experts" in choice.fields:
                raise ValueError(f"there is no gate for the adapter {name!r}: it has experts, and gates of its own")
        for key, pool in self.weights.pools.items():
            if pool.trainable:
                what = "sites share what it trains, whose price is no sum over them"
                raise ValueError(f"there is no gate for an adapter of kind {key.kind!r}: {what}")
        self.decisions = dict(_decisions(space, evaluator.device))

    def attach(self) -> GatedAttachment:
        return GatedAttachment(self.evaluator, self.space, self.decisions, self.weights, self.seed)

    def value_weights(self, noise: Generator | None = None) -> dict[str, Tensor]:
        """The weights [V] of every gene; see `Decision.weights`."""
        return {gene: decision.weights(noise) for gene, decision in self.decisions.items()}

    def train(self, num_steps: int, progress: Progress | None = None) -> list[float]:
        """Train weights and gates for `num_steps` steps; returns the task's loss at each.

        Raises TrainingFailedError when a loss is not a number.
        """
        evaluator, training = self.evaluator, self.training
        parameters = list(self.weights.trainable())
        shares = [rate(step, num_steps, training) for step in range(num_steps)]
        held = [0.0 if step < HELD * num_steps else share for step, share in enumerate(shares)]
        rates = [training.learning_rate * share for share in shares]
        gate_rates = [REACH * share / (sum(held) or 1.0) for share in held]
        logits = [decision.logits for decision in self.decisions.values()]
        groups = [{**group, "rates": rates} for group in decay_groups(parameters, training)]
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
        """The values of the genes that are likelier than not: gates thresholded at 1/2, the likeliest type.

        Searched fields of the training have the values that the gates were trained with, or their middle.
        """
        values = {gene: decision.value() for gene, decision in self.decisions.items()}
        for key, domain in self.space.training.items():
            if isinstance(domain, Domain) and domain.contains(value := getattr(self.training, key)):
                values[TRAINING + key] = value
        return self.space.completed(values)

    def sweep(self, penalties: Sequence[float], num_steps: int, progress: Progress | None = None) -> list[Assignment]:
        """What gates with each of `penalties` choose, trained from the start, every architecture once."""
        found: dict[Architecture, Assignment] = {}
        for run, penalty in enumerate(penalties):
            gates = Gates(self.evaluator, self.space, self.training, self.seed, penalty)
            gates.train(num_steps, _part(progress, run * num_steps, len(penalties) * num_steps))
            assignment = gates.chosen()
            found.setdefault(self.space.decode(assignment).architecture, assignment)
        return list(found.values())

    @torch.no_grad()
    def scores(self, architectures, progress=None):
        """Minus the log-likelihood of the genes that `SearchSpace.locate` reads an architecture by; NaN for one that is
        not in the space.
        """
        logs = {gene: decision.probabilities().log().tolist() for gene, decision in self.decisions.items()}
        scores = []
        for number, architecture in enumerate(architectures, 1):
            genes = locate(self.space, Candidate(architecture=architecture))
            if genes is None:
                scores.append(math.nan)
            else:
                own = [(gene, value) for gene, value in genes.items() if gene in logs]
                scores.append(-math.fsum(logs[gene][self.decisions[gene].index(value)] for gene, value in own))
            if progress is not None:
                progress(number, len(architectures))
        return scores


def _decisions(space: SearchSpace, device: torch.device) -> Iterator[tuple[str, Decision]]:
    """Every gene of the architecture, as the largest one has it."""
    sizes = {place.genes.get(ADAPTERS[place.kind].size_field or "") for place in space.placements}
    largest = space.largest()
    for gene in space.genes:
        if not gene.name.startswith(TRAINING):
            values, ordered = _levels(gene.domain, gene.name in sizes)
            start = largest.get(gene.name, gene.domain.from_unit(1.0))
            yield gene.name, Decision(values, ordered, start, device)


def _levels(domain: Domain, is_size: bool) -> tuple[Sequence[Value], bool]:
    """The values of a gene that have weights, and whether they are nested."""
    if isinstance(domain, Float):
        return [domain.from_unit(0.5)], True
    if isinstance(domain, Choice):
        return (sorted(domain.choices), True) if is_size else (domain.choices, domain == BOOLEAN)
    places = range(MOST_LEVELS)
    values = sorted({domain.low, domain.high, *(domain.from_unit(i / (MOST_LEVELS - 1)) for i in places)})
    return values, is_size


def _part(progress: Progress | None, done: int, of: int) -> Progress | None:
    """Of a run that is one of several."""
    return None if progress is None else lambda step, _: progress(done + step, of)
