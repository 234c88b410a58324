"""Samples of generated text at the end of a study: the recommended member and the bare model beside the references."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from autopeft.evaluators.atomic import atomic_write_text
from autopeft.evaluators.base import Evaluator, Request
from autopeft.evaluators.tasks import Prompted
from autopeft.studies.analysis.snapshot import Entry, Snapshot
from autopeft.studies.errors import cause

if TYPE_CHECKING:
    from autopeft.evaluators.training.base import TrainingEvaluator

LOGGER = logging.getLogger(__name__)
#: Validation rows whose texts are generated, evenly spread over the split.
MOST_SAMPLES = 6
#: Tokens of a generated text.
MOST_TOKENS = 256
#: Files of the samples in the folder of the report.
STEM = "samples"


@dataclass(frozen=True, slots=True)
class Sample:
    """A validation row with the greedy texts of two models. `row`: its position in the split."""

    row: int
    prompt: str
    reference: str
    recommended: str
    untouched: str


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples of the trial that is recommended."""

    trial: int
    samples: tuple[Sample, ...]

    def markdown(self) -> str:
        """Return the samples as a page: blocks of code, because texts may have any characters."""
        parts = [f"# Samples\n\nGreedy texts of trial {self.trial} (recommended) and of the model without adapters.\n"]
        for sample in self.samples:
            parts.append(f"## Validation row {sample.row + 1}\n")
            for name in ("prompt", "reference", "recommended", "untouched"):
                text = getattr(sample, name).replace("\n", "\n    ")
                parts.append(f"{name}:\n\n    {text}\n")
        return "\n".join(parts)

    def lines(self) -> list[str]:
        """Return a few lines for a terminal: of each text the beginning, in one line."""
        found = ["", f"greedy texts of validation rows (recommended: trial {self.trial}; untouched: without adapters)"]
        for sample in self.samples:
            found.append(f"  prompt       {_shortened(sample.prompt)}")
            texts = {name: getattr(sample, name) for name in ("reference", "recommended", "untouched")}
            found += [f"    {name:<12} {_shortened(text)}" for name, text in texts.items()]
        return found


def _shortened(text: str, width: int = 96) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def write_samples(
    evaluator: Evaluator, snapshot: Snapshot, weights_path: Callable[[Path, int], Path], output_folder: Path
) -> Samples | None:
    """Generate the samples and write `samples.json` and `samples.md` into the folder of the report.

    `weights_path`: returns the file of a trial's weights in the output folder. None for tasks without texts to
    generate, for rows without prompts, and without a recommended member whose weights are kept. Nothing else depends on
    the samples, so a failure is a warning.
    """
    from autopeft.evaluators.training.base import TrainingEvaluator

    recommendation = snapshot.front().recommendation
    if not isinstance(evaluator, TrainingEvaluator) or recommendation is None:
        return None
    try:
        weights = weights_path(output_folder, recommendation.recommended)
        found = _samples(evaluator, snapshot.entry(recommendation.recommended), weights)
        if found is not None:
            folder = output_folder / "report"
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write_text(folder / f"{STEM}.json", json.dumps(asdict(found), indent=2, ensure_ascii=False) + "\n")
            atomic_write_text(folder / f"{STEM}.md", found.markdown())
    except Exception as error:
        LOGGER.warning("the report has no samples of generated text: %s; the results are complete", cause(error))
        return None
    return found


def _samples(evaluator: TrainingEvaluator, entry: Entry, weights: Path) -> Samples | None:
    task = evaluator.task
    every = [(i, task.prompted(example)) for i, example in enumerate(evaluator.examples["validation"])]
    with_prompts = [(i, found) for i, found in every if found is not None]
    if not with_prompts or not weights.is_file():
        return None
    chosen = with_prompts[:: max(1, len(with_prompts) // MOST_SAMPLES)][:MOST_SAMPLES]
    rows = [found for _, found in chosen]
    adapted = _texts(evaluator, rows, Request(candidate=entry.trial.candidate, seed=entry.runs[0].seed), weights)
    bare = _texts(evaluator, rows, None, weights)
    read = partial(task.processor.decode, skip_special_tokens=True)
    return Samples(
        entry.trial.number,
        tuple(
            Sample(i, read(row.prompt), read(row.reference), read(own), read(other))
            for (i, row), own, other in zip(chosen, adapted, bare, strict=True)
        ),
    )


def _texts(
    evaluator: TrainingEvaluator, rows: Sequence[Prompted], request: Request | None, weights: Path
) -> list[list[int]]:
    """Return the greedy tokens after the prompts, of a candidate with its stored weights or of the bare model."""
    from autopeft.evaluators.generation import ends_of, greedy

    tokenizer = evaluator.task.processor
    # Positions that are left: a row with its reference fits the model, a text of twice the length may not.
    room = evaluator.task.limit(evaluator.model) - max(len(row.prompt) for row in rows)
    with nullcontext() if request is None else evaluator.attach(request) as attachment:
        if attachment is not None:
            attachment.load_state(load_file(weights, device=str(evaluator.device)))
            attachment.eval()
        return greedy(
            evaluator.model,
            [row.prompt for row in rows],
            attachment=attachment,
            ends=ends_of(evaluator.model, tokenizer, [row.reference for row in rows]),
            padding=tokenizer.pad_token_id,
            max_new_tokens=min(2 * max(len(row.reference) for row in rows), MOST_TOKENS, room),
            domains=[row.domain for row in rows] if evaluator.task.domains else None,
        )
