"""Speed of generated texts: candidates of a pack against transformers' own batched `generate` on the bare model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.costs.timing import Spread, now
from autopeft.evaluators.generation import greedy_of_slots
from autopeft.evaluators.training.base import TrainingEvaluator
from autopeft.search_space.adapters import AdapterSpec, Bottleneck, Lora
from autopeft.search_space.architecture import Architecture
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.reports import markdown

#: Adapters by name, and the roles of their sites, of all layers.
ADAPTERS: dict[str, tuple[AdapterSpec, tuple[str, ...]]] = {
    "LoRA of rank 16 at queries and values": (Lora(rank=16), ("attn.q", "attn.v", "attn.qkv")),
    "bottleneck of size 16 after the mlp": (Bottleneck(size=16), ("mlp",)),
}
SLOTS = (1, 4, 8)
PROMPTS, NEW_TOKENS = 24, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TextsRow:
    """Time of the texts of one candidate of a pack over that of `generate`. `seconds`: median, per candidate."""

    adapter: str
    slots: int
    ratio: Spread
    seconds: float


def measure_texts(
    evaluator: TrainingEvaluator, rounds: int, advance: Callable[[], None] = lambda: None
) -> list[TextsRow]:
    """Measure texts of `NEW_TOKENS` tokens after `PROMPTS` validation prompts, without an end, so that work is equal.

    Every round runs `generate` and each arm once, in an order that rotates; `generate` once more before, as a warm-up.
    Raises ConfigurationError for rows without prompts.
    """
    rows = [evaluator.task.prompted(example) for example in evaluator.examples["validation"]]
    prompts = [list(row.prompt) for row in rows if row is not None][:PROMPTS]
    if not prompts:
        raise ConfigurationError("the validation rows have no prompts, after which texts could be generated")
    arms: dict[tuple[str, int], Callable[[], float]] = {("", 1): partial(_generate_s, evaluator, prompts)}
    for name, (spec, roles) in ADAPTERS.items():
        sites = [site.name for site in evaluator.backbone.sites if site.role in roles]
        architecture = Architecture.of({site: [spec] for site in sites})
        for slots in SLOTS if sites else ():
            arms[name, slots] = partial(_texts_s, evaluator, prompts, architecture, slots)
    order, taken = list(arms), []
    arms["", 1]()
    for _ in range(rounds):
        seconds = {}
        for arm in order:
            seconds[arm] = arms[arm]() / arm[1]
            advance()
        taken.append(seconds)
        order = [*order[1:], order[0]]
    return [
        TextsRow(
            adapter=name,
            slots=slots,
            ratio=Spread.of([each[name, slots] / each["", 1] for each in taken]),
            seconds=statistics.median(each[name, slots] for each in taken),
        )
        for name, slots in arms
    ]


def num_runs(rounds: int) -> int:
    """Return how many times arms run, at most."""
    return rounds * (1 + len(ADAPTERS) * len(SLOTS))


@torch.no_grad()
def _generate_s(evaluator: TrainingEvaluator, prompts: Sequence[Sequence[int]]) -> float:
    """Return the seconds of transformers' `generate`: one batch, padded on the left by the tokenizer."""
    model: Any = evaluator.model
    tokenizer = evaluator.task.processor
    batch = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt").to(evaluator.device)
    begin = now(evaluator.device)
    model.generate(
        **batch,
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return now(evaluator.device) - begin


def _texts_s(
    evaluator: TrainingEvaluator, prompts: Sequence[Sequence[int]], architecture: Architecture, slots: int
) -> float:
    with Attachment(evaluator.model, evaluator.backbone, [architecture] * slots, [0] * slots) as attachment:
        attachment.eval()
        begin = now(evaluator.device)
        greedy_of_slots(
            evaluator.model,
            prompts,
            attachment=attachment,
            ends=(),
            padding=evaluator.task.processor.pad_token_id,
            max_new_tokens=NEW_TOKENS,
        )
        return now(evaluator.device) - begin


def to_markdown(rows: Sequence[TextsRow]) -> str:
    """Return the ratios as a table."""
    lines = [
        ["texts of a candidate, over transformers' generate on the bare model", "pack", "ratio", "s per candidate"]
    ]
    for row in rows:
        ratio = f"{row.ratio.median:.2f} ({row.ratio.low:.2f} to {row.ratio.high:.2f})" if row.adapter else "1"
        lines.append([row.adapter or "`generate`", str(row.slots), ratio, f"{row.seconds:.1f}"])
    return f"{PROMPTS} prompts, {NEW_TOKENS} new tokens each:\n\n{markdown.table(lines)}\n"
