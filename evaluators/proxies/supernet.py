"""The supernet: adapter weights that all architectures of a space share, trained once to score many subnets.

Notation: B subnets side by side (the slots of one `Attachment`), M banks, N examples of a minibatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from typing_extensions import override

from autopeft.evaluators.atomic import atomic_write
from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.layout import repeated
from autopeft.evaluators.attachment.shared_weights import SharedWeights
from autopeft.evaluators.base import Progress
from autopeft.evaluators.proxies.base import Proxy
from autopeft.evaluators.tasks import Batch, model_inputs
from autopeft.evaluators.training import batching
from autopeft.evaluators.training.optimizer import parameter_groups, set_rate
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.record import TrainingFailedError
from autopeft.evaluators.training.schedule import rate
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.search_space.training import Training

#: Subnets scored in one pack.
SLOTS = 8
#: Approximate number of held-out examples for the score; the same for all subnets.
SCORED_EXAMPLES = 48
#: Maximum number of these in one batch, of similar length.
BATCH_SIZE = 48
#: Steps between two checkpoints.
STEPS_BETWEEN_CHECKPOINTS = 25

#: Returns the bank that a subnet reads; None for the one with the lowest loss.
BankOf = Callable[[Architecture], int | None]
#: Returns the subnets of a training step; steps are numbered from 1.
Steps = Callable[[int], Sequence[Architecture]]


class Supernet(Proxy):
    """Weights of the largest adapters; each subnet reads nested prefixes of them.

    Guo et al. 2020, SPOS; Cai et al. 2020, once-for-all. Call `train` once, then `scores`: the held-out loss of a
    subnet with inherited weights. Searched training fields are ignored: all subnets are trained with one `training`.

    `num_banks`: M sets of weights. `bank_of` returns the set that a subnet reads. If it returns None, training assigns
    the subnets of a step to banks by lowest total loss, equally many to each bank (Javan et al. 2023, "Balanced Mixture
    of SuperNets", as an assignment problem), and a score is the lowest over the banks. `distil`: the first subnet of a
    step learns from the labels, the others from its outputs (Yu et al. 2020, BigNAS, in-place distillation). Raises
    ValueError for distillation where the task's logits are not a distribution over labels.
    """

    name = "supernet"
    summary = "held-out loss with inherited weights"
    source = "Guo et al. 2020, Single Path One-Shot NAS, section 3"

    def __init__(
        self,
        evaluator: PackedEvaluator,
        space: SearchSpace,
        training: Training,
        seed: int,
        *,
        num_banks: int = 1,
        bank_of: BankOf = lambda architecture: 0,
        distil: bool = False,
    ) -> None:
        if distil and not evaluator.task.distils:
            raise ValueError("distillation supports only classification with one label per row")
        self.evaluator = evaluator
        self.training = training
        self.seed = seed
        self.bank_of = bank_of
        self.distil = distil
        self.weights = SharedWeights(
            evaluator.model,
            space,
            seed=seed,
            num_banks=num_banks,
            pretrained_head=evaluator.pretrained_head,
            starts=evaluator.starts,
        )
        held_out = len(evaluator.examples["validation"])
        self.examples = range(held_out)[:: max(1, held_out // SCORED_EXAMPLES)]

    def attach(self, architectures: Sequence[Architecture], banks: Sequence[int], seed: int | str = 0) -> Attachment:
        """Return a context manager that attaches subnets side by side, each with the weights of its bank."""
        evaluator = self.evaluator
        seeds = [f"{seed}/{k}" for k in range(len(architectures))]
        return Attachment(
            evaluator.model, evaluator.backbone, architectures, seeds, shared=self.weights, bank_of_slot=banks
        )

    # Training

    def train(
        self,
        steps: Steps,
        num_steps: int,
        *,
        checkpoint: Path | None = None,
        key: str = "",
        progress: Progress | None = None,
    ) -> list[list[float]]:
        """Train for `num_steps` steps; return the losses of the subnets of each step.

        With `checkpoint`, resume from that file if it exists and has the same `key`. Raises TrainingFailedError if a
        loss is not finite.
        """
        parameters = list(self.weights.trainable())
        groups = parameter_groups(parameters, self.training, self.weights.rate_factors())
        optimizer = AdamW(groups, lr=self.training.learning_rate, fused=True)
        losses = self._restored(checkpoint, key, optimizer)
        done = len(losses)
        order = batching.training_batches(self.evaluator.lengths["train"], self.training.batch_size, self.seed)
        for number, indices in zip(range(done + 1, num_steps + 1), islice(order, done, None), strict=False):
            set_rate(optimizer, self.training.learning_rate * rate(number - 1, num_steps, self.training))
            losses.append(self._step(list(steps(number)), number, indices))
            if not all(map(math.isfinite, losses[-1])):
                raise TrainingFailedError(f"the supernet's loss became {losses[-1]} at step {number} of {num_steps}")
            if self.training.max_grad_norm:
                clip_grad_norm_([p for p, _ in parameters], self.training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if checkpoint is not None and (number % STEPS_BETWEEN_CHECKPOINTS == 0 or number == num_steps):
                self._save(checkpoint, key, optimizer, losses)
            if progress is not None:
                progress(number, num_steps)
        return losses

    def _step(self, architectures: Sequence[Architecture], number: int, indices: Sequence[int]) -> list[float]:
        """Compute gradients of the mean loss over the subnets; return their losses on the labels."""
        banks = self._banks(architectures, indices)
        with self.attach(architectures, banks, f"{self.seed}/{number}") as attachment:
            loss, objective = self._losses(attachment, indices)
            torch.autograd.backward(attachment.routers.penalised(objective).mean())
        losses: list[float] = loss.tolist()
        return losses

    def _losses(self, attachment: Attachment, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the losses [B] on the labels and the training objectives [B].

        The two are equal, but with `distil` the objectives of all slots but the first are the KL divergences from the
        outputs of the first.
        """
        if not self.distil or attachment.num_slots == 1:
            loss = self.evaluator.scores(attachment, "train", indices)["loss"].mean(1)
            return loss, loss
        found: list[Tensor] = []
        handle = self.evaluator.model.register_forward_hook(lambda module, args, out: found.append(out.logits))
        try:
            loss = self.evaluator.scores(attachment, "train", indices)["loss"].mean(1)
        finally:
            handle.remove()
        logits = found[-1].float().view(attachment.num_slots, len(indices), -1).log_softmax(-1)
        teacher = logits[:1].detach().expand_as(logits[1:])
        distances = F.kl_div(logits[1:], teacher, reduction="none", log_target=True).sum(-1).mean(1)
        return loss, torch.cat([loss[:1], distances])

    @torch.no_grad()
    def _banks(self, architectures: Sequence[Architecture], indices: Sequence[int]) -> list[int]:
        """Return the bank that each subnet of a step trains."""
        fixed = [self.bank_of(architecture) for architecture in architectures]
        if None not in fixed:
            return [bank for bank in fixed if bank is not None]
        count = self.weights.num_banks
        losses = torch.zeros(len(architectures), count)
        for bank in range(count):
            with self.attach(architectures, [bank] * len(architectures)) as attachment:
                attachment.eval()
                losses[:, bank] = self.evaluator.scores(attachment, "train", indices)["loss"].mean(1).cpu()
        seats = np.arange(count).repeat(-(-len(architectures) // count))
        rows, columns = linear_sum_assignment(torch.nan_to_num(losses, 1e6, 1e6).numpy()[:, seats])
        return [int(seats[column]) for _, column in sorted(zip(rows, columns, strict=True))]

    def _save(self, path: Path, key: str, optimizer: AdamW, losses: list[list[float]]) -> None:
        state = {
            "key": key,
            "losses": losses,
            "weights": [value.detach() for value, _ in self.weights.trainable()],
            "optimizer": optimizer.state_dict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # Into an open file: to a name, torch writes by itself and does not say what the disk lacks.
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)

    @torch.no_grad()
    def _restored(self, path: Path | None, key: str, optimizer: AdamW) -> list[list[float]]:
        """Load weights and optimiser from a checkpoint; return the losses of its steps, empty if there is none."""
        if path is None or not path.is_file():
            return []
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.evaluator.device, weights_only=True)
        except (RuntimeError, UnpicklingError, EOFError):  # a truncated file, as after a power failure
            return []
        if state["key"] != key:
            return []
        for (value, _), saved in zip(self.weights.trainable(), state["weights"], strict=True):
            value.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        losses: list[list[float]] = state["losses"]
        return losses

    # Scores

    @override
    def scores(self, architectures: Sequence[Architecture], progress: Progress | None = None) -> list[float]:
        """Return the mean held-out loss of each subnet over the scored examples."""
        banks = [self.bank_of(architecture) for architecture in architectures]
        # A subnet without a fixed bank is scored with each bank.
        pairs = [
            (index, bank)
            for index, fixed in enumerate(banks)
            for bank in (range(self.weights.num_banks) if fixed is None else (fixed,))
        ]
        best = [math.nan] * len(architectures)
        found = self._scored([(architectures[index], bank) for index, bank in pairs])
        for done, (i, loss) in enumerate(found, 1):
            index, _ = pairs[i]
            best[index] = loss if math.isnan(best[index]) else min(best[index], loss)
            if progress is not None:
                progress(done, len(pairs))
        return best

    @torch.no_grad()
    def _scored(self, subnets: Sequence[tuple[Architecture, int]]) -> Iterator[tuple[int, float]]:
        """Yield indices and losses of subnets, each with its bank.

        Subnets with equal lower layers are neighbours, so that the output of these layers is computed once.
        """
        evaluator = self.evaluator
        lengths = [evaluator.lengths["validation"][i] for i in self.examples]
        batches = [
            evaluator.batch("validation", [self.examples[place] for place in places])
            for places in batching.ordered_batches(lengths, BATCH_SIZE)
        ]
        depth = self._best_depth(subnets)
        families: dict[tuple[Architecture, int], list[int]] = {}
        for i, (architecture, bank) in enumerate(subnets):
            families.setdefault((self._part(architecture, depth, lower=True), bank), []).append(i)
        for parents in _chunks(list(families), SLOTS):
            below = [self._below(parents, batch, depth) for batch in batches]
            members = [(i, parent) for parent, key in enumerate(parents) for i in families[key]]
            for chunk in _chunks(members, SLOTS):
                uppers = [self._part(subnets[i][0], depth, lower=False) for i, _ in chunk]
                with self.attach(uppers, [subnets[i][1] for i, _ in chunk]) as attachment:
                    attachment.eval()
                    total = torch.zeros(len(chunk), device=evaluator.device)
                    for batch, hidden in zip(batches, below, strict=True):
                        attachment.routers.tokens.domains = batch.get("domains")
                        own = None if hidden is None else hidden[[parent for _, parent in chunk]].flatten(0, 1)
                        total += self._above(batch, own, depth, len(chunk)).sum(1)
                yield from zip((i for i, _ in chunk), (total / len(self.examples)).tolist(), strict=True)

    def _best_depth(self, subnets: Sequence[tuple[Architecture, int]]) -> int:
        """Return the number of lower layers to share between subnets that minimises the total number of layer runs."""
        layers = self.evaluator.backbone.num_layers if self.evaluator.lower_layers is not None else 0

        def cost(depth: int) -> int:
            families = {(self._part(architecture, depth, lower=True), bank) for architecture, bank in subnets}
            return len(families) * depth + len(subnets) * (layers - depth)

        return min(range(layers + 1), key=cost)

    def _part(self, architecture: Architecture, depth: int, *, lower: bool) -> Architecture:
        """Return the adapters below layer `depth`, or those from it on; adapters outside the layers are in both."""
        backbone = self.evaluator.backbone
        adapters = {
            name: specs
            for name, specs in architecture.adapters
            if (layer := backbone.site(name).layer) is None or (layer < depth) is lower
        }
        return Architecture.of(adapters)

    def _below(self, parents: Sequence[tuple[Architecture, int]], batch: Batch, depth: int) -> Tensor | None:
        """Return the output of the lowest `depth` layers of each parent, [parents, N, T, D]; None if none is shared."""
        prefix = self.evaluator.lower_layers
        if prefix is None or not depth:
            return None
        with self.attach([part for part, _ in parents], [bank for _, bank in parents]) as attachment:
            attachment.eval()
            attachment.routers.tokens.domains = batch.get("domains")
            inputs = {name: repeated(t, len(parents)) for name, t in model_inputs(batch).items()}
            hidden = prefix(inputs, depth)
        return hidden.view(len(parents), -1, *hidden.shape[1:])

    def _above(self, batch: Batch, hidden: Tensor | None, depth: int, slots: int) -> Tensor:
        """Return losses [slots, N], computed from the output of the lowest `depth` layers if there is one."""
        prefix = self.evaluator.lower_layers
        with nullcontext() if hidden is None or prefix is None else prefix.replaced(hidden, depth):
            packed = {name: repeated(tensor, slots) for name, tensor in batch.items()}
            losses = self.evaluator.task.scores(self.evaluator.model, packed)["loss"]
        return losses.view(slots, -1)


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
