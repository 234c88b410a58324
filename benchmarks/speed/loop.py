"""The reference: one candidate after the other by peft and transformers' Trainer, as a careful user writes it.

It has all optimisations that are free: those of `trainer.py`, and a copy in memory of a model that is loaded once. The
backbone's own dropout is off, because our evaluators keep the frozen part in evaluation mode. By default a Trainer
would draw that dropout too, and be slower.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch
from peft import get_peft_model
from torch import Tensor

from autopeft.benchmarks.speed.trainer import order_trainer, trained_in_float32, without_dropout
from autopeft.evaluators.attachment.heads import head_sites
from autopeft.evaluators.base import Request
from autopeft.evaluators.costs.timing import now
from autopeft.evaluators.training.base import TrainingEvaluator
from autopeft.search_space.architecture import Candidate
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.exporters.peft_adapter import fill
from autopeft.studies.exporters.peft_config import PeftPlan, plan
from autopeft.studies.recipes.build import bare_recipe
from autopeft.studies.recipes.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateRun:
    """Result of an arm for one candidate. `losses`: of the training steps. `loss`, `accuracy`: on validation rows."""

    losses: Sequence[float]
    loss: float
    accuracy: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopRun(CandidateRun):
    """Result of the loop with the parts of its `seconds`; the rest is the model's copy, peft's modules and Trainer."""

    step_s: float
    validation_s: float


class Loop:
    """The loop over candidates. `evaluator` provides model, task and rows; it trains nothing."""

    def __init__(self, evaluator: TrainingEvaluator, settings: StudyFile) -> None:
        self.evaluator = evaluator
        self.settings = settings
        self.head_sites = head_sites(evaluator.model, evaluator.backbone)

    def recipe(self, candidate: Candidate) -> Recipe:
        """Return the recipe of a candidate."""
        evaluator = self.evaluator
        labels = evaluator.task.labels or None
        return bare_recipe(self.settings, labels, evaluator.backbone, candidate, self.head_sites)

    def holds(self, candidate: Candidate) -> bool:
        """Return whether peft can represent this candidate."""
        return plan(self.recipe(candidate)).fit.level != "unsupported"

    def prepare(self, requests: Sequence[Request]) -> Iterator[LoopRun]:
        """Return the runs, each trained when it is iterated to. Initial values are drawn now, by our own attachment."""
        prepared = []
        for request in requests:
            recipe = self.recipe(request.candidate)
            with self.evaluator.attach(request) as attachment:
                prepared.append((request, recipe, plan(recipe), attachment.state()))
        return (self._run(*arguments) for arguments in prepared)

    def _run(self, request: Request, recipe: Recipe, planned: PeftPlan, state: dict[str, Tensor]) -> LoopRun:
        device = self.evaluator.device
        with TemporaryDirectory() as folder:
            begin = now(device)
            model = get_peft_model(without_dropout(copy.deepcopy(self.evaluator.model)), planned.build())
            with torch.no_grad():
                fill(model.base_model.model, recipe, state)
            trained_in_float32(model)
            trainer = order_trainer(self.evaluator, model, request, folder)
            prepared = now(device)
            trainer.train()
            trained = now(device)
            found = trainer.evaluate()
            end = now(device)
            losses = torch.stack(trainer.losses).tolist()
        run = LoopRun(
            losses=losses,
            loss=found["eval_loss"],
            accuracy=found["eval_accuracy"],
            seconds=end - begin,
            step_s=(trained - prepared) / len(losses),
            validation_s=end - trained,
        )
        # The Trainer and its model are a reference cycle. Not timed: a user may collect garbage less often.
        del model, trainer
        gc.collect()
        return run
