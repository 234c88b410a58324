"""The reference: one candidate after the other by peft and transformers' Trainer, as a careful user writes it.

It has what costs nothing to get right: that of `trainer.py`, and a copy in memory of a model that is loaded once. The
backbone's own dropout is off: our evaluators keep the frozen part in evaluation mode. A Trainer that is left alone
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
class Run:
    """What an arm found of a candidate, and what it took. Losses: of the training steps."""

    losses: Sequence[float]
    loss: float
    accuracy: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopRun(Run):
    """`seconds` of the loop in their parts; the rest is the copy of the model, peft's modules and the Trainer."""

    step_s: float
    validation_s: float


class Loop:
    """The loop over candidates. `evaluator` lends its model, task and rows; it trains nothing."""

    def __init__(self, evaluator: TrainingEvaluator, settings: StudyFile) -> None:
        self.evaluator = evaluator
        self.settings = settings
        self.head_sites = head_sites(evaluator.model, evaluator.backbone)

    def recipe(self, candidate: Candidate) -> Recipe:
        evaluator = self.evaluator
        labels = evaluator.task.labels or None
        return bare_recipe(self.settings, labels, evaluator.backbone, candidate, self.head_sites)

    def holds(self, candidate: Candidate) -> bool:
        """Whether peft has this candidate's network."""
        return plan(self.recipe(candidate)).fit.level != "unsupported"

    def prepare(self, requests: Sequence[Request]) -> Iterator[LoopRun]:
        """The runs, each of which is trained when it is asked for. Initial values are made now, by our own host."""
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
        # The Trainer and its model hold each other. Not timed: a user may have them collected less often.
        del model, trainer
        gc.collect()
        return run
