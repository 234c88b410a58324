"""Cost of routing: a training step with mixtures over one with plain adapters of the same active rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.costs.timing import Spread, interleaved, now
from autopeft.evaluators.training import batching
from autopeft.evaluators.training.optimizer import PackedAdamW
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.search_space.adapters import AdapterSpec, Lora, Mixture
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import LINEAR_ROLES
from autopeft.search_space.training import Training
from autopeft.studies.reports import markdown

EXPERTS, TOP_K, RANK = 8, 2, 8
PLACES = {"query and value": ("attn.q", "attn.v"), "all linears": LINEAR_ROLES}
SLOTS = (1, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRow:
    """Time of a step over that with plain LoRAs of the active rank.

    `routed`: with mixtures. `total`: with LoRAs of the rank of all experts together.
    """

    place: str
    slots: int
    tokens: int
    routed: Spread
    total: Spread


def measure_experts(evaluator: PackedEvaluator, training: Training, advance: Callable[[], None]) -> list[RoutingRow]:
    """Measure full steps (forward, backward, optimiser) on one minibatch of median length, without shared layers."""
    batches = batching.ordered_batches(evaluator.lengths["train"], training.batch_size)
    indices = batches[len(batches) // 2]
    tokens = evaluator.batch("train", indices)["input_ids"].numel()
    arms: dict[str, AdapterSpec] = {
        "routed": Mixture(expert=Lora(rank=RANK), experts=EXPERTS, top_k=TOP_K),
        "total": Lora(rank=EXPERTS * RANK),
    }
    rows = []
    for place, roles in PLACES.items():
        for slots in SLOTS:
            found = {}
            for name, spec in arms.items():
                timed = partial(_step_s, evaluator, roles, training, slots, indices)
                found[name] = interleaved(partial(timed, spec), partial(timed, Lora(rank=TOP_K * RANK)))
                advance()
            rows.append(RoutingRow(place=place, slots=slots, tokens=slots * tokens, **found))
    return rows


def _step_s(
    evaluator: PackedEvaluator,
    roles: tuple[str, ...],
    training: Training,
    slots: int,
    indices: Sequence[int],
    spec: AdapterSpec,
) -> float:
    """Return the seconds of the second of two steps."""
    sites = [site.name for site in evaluator.backbone.sites if site.role in roles]
    architecture = Architecture.of({name: [spec] for name in sites})
    with Attachment(evaluator.model, evaluator.backbone, [architecture] * slots, [0] * slots) as attachment:
        optimizer = PackedAdamW(attachment, [training] * slots)
        rates = torch.full((slots,), training.learning_rate, device=evaluator.device)
        for number in (1, 2):
            begin = now(evaluator.device)
            loss = evaluator.scores(attachment, "train", indices)["loss"].mean(1)
            attachment.routers.penalised(loss).sum().backward()
            optimizer.step(number, rates)
        return now(evaluator.device) - begin


def to_markdown(rows: list[RoutingRow]) -> str:
    """Return the ratios as a table."""
    head = [f"{EXPERTS} experts of rank {RANK}, {TOP_K} for a token", "slots x tokens"]
    lines = [[*head, "routed", f"one LoRA of rank {EXPERTS * RANK}"]]
    for row in rows:
        figures = [f"{s.median:.2f} ({s.low:.2f} to {s.high:.2f})" for s in (row.routed, row.total)]
        lines.append([row.place, f"{row.slots} x {row.tokens // row.slots}", *figures])
    text = f"A training step, over that with one LoRA of rank {TOP_K * RANK} in their place:"
    return f"{text}\n\n{markdown.table(lines)}\n"
