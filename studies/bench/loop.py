"""The reference: one candidate after the other by peft and transformers' Trainer, as a careful user writes it.

It has what costs nothing to get right: the same minibatches in the same order, padding to the longest row of a
minibatch, fused AdamW, rows of similar length together in the scoring, no logging, no saving, no evaluation but the
last, and a copy in memory of a model that is loaded once. The backbone's own dropout is off: our evaluators keep the
frozen part in evaluation mode. A Trainer that is left alone would draw that dropout too, and be slower.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from autopeft.evaluators import batching
from autopeft.evaluators.base import Request
from autopeft.evaluators.heads import head_sites
from autopeft.evaluators.train import EVALUATION_BATCH_SIZE, TrainEvaluator, rate
from autopeft.search_space.architecture import Candidate
from autopeft.studies.exporters.peft_adapter import fill
from autopeft.studies.exporters.peft_config import PeftPlan, plan
from autopeft.studies.recipe import Recipe
from autopeft.studies.selection import bare_recipe
from autopeft.studies.study_file import StudyFile


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

    def __init__(self, evaluator: TrainEvaluator, settings: StudyFile) -> None:
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
        with TemporaryDirectory() as folder:
            begin = self._now()
            model = get_peft_model(_without_dropout(copy.deepcopy(self.evaluator.model)), planned.build())
            with torch.no_grad():
                fill(model.base_model.model, recipe, state)
            _trained_in_float32(model)
            trainer = self._trainer(model, request, folder)
            prepared = self._now()
            trainer.train()
            trained = self._now()
            found = trainer.evaluate()
            end = self._now()
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

    def _trainer(self, model: Any, request: Request, folder: str) -> _Trainer:
        training = self.evaluator.training(request.candidate)
        steps, full = self.evaluator.num_steps(request), self.evaluator.full_steps(training)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        decayed = [p for name, p in trained if _decays(name, p)]
        others = [p for name, p in trained if not _decays(name, p)]
        groups = [
            {"params": decayed, "weight_decay": training.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = AdamW([g for g in groups if g["params"]], lr=training.learning_rate, fused=True)
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=training.batch_size,
            per_device_eval_batch_size=EVALUATION_BATCH_SIZE,
            max_grad_norm=training.max_grad_norm,
            seed=request.seed,
            use_cpu=self.evaluator.device.type == "cpu",
            dataloader_pin_memory=self.evaluator.device.type == "cuda",
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            log_level="error",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = _Trainer(
            model=model,
            args=arguments,
            compute_metrics=_means,
            optimizers=(optimizer, LambdaLR(optimizer, lambda step: rate(step, full, training))),
        )
        trainer.remove_callback(PrinterCallback)  # stdout is for the result
        trainer.evaluator, trainer.request, trainer.losses = self.evaluator, request, []
        return trainer

    def _now(self) -> float:
        return now(self.evaluator.device)


class _Trainer(Trainer):
    """The task's loss, and the study's order of the rows."""

    evaluator: TrainEvaluator
    request: Request
    #: Of each step, on the device: reading them would wait for it.
    losses: list[Tensor]

    def get_train_dataloader(self) -> Any:
        order = batching.training_batches(
            self.evaluator.lengths["train"], self.args.per_device_train_batch_size, self.request.seed
        )
        return self._loader("train", list(islice(order, self.args.max_steps)))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._loader(
            "validation", batching.ordered_batches(self.evaluator.lengths["validation"], EVALUATION_BATCH_SIZE)
        )

    def _loader(self, split: str, batches: list[list[int]]) -> Any:
        rows: Any = self.evaluator.examples[split]
        loader: DataLoader[Any] = DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.evaluator.task.collate,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self.evaluator.task.scores(model, inputs)[0].mean()
        self.losses.append(loss.detach())
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            losses, accuracies = self.evaluator.task.scores(model, self._prepare_inputs(inputs))
        return None, torch.stack((losses, accuracies), 1), losses


def _means(prediction: Any) -> dict[str, float]:
    loss, accuracy = prediction.predictions.mean(0)
    return {"loss": float(loss), "accuracy": float(accuracy)}


def _without_dropout(model: nn.Module) -> nn.Module:
    """Before peft adds the adapters, whose own dropout stays."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _trained_in_float32(model: nn.Module) -> None:
    """peft keeps its own parameters in float32 on a backbone of a lower precision; this does it for the task head."""

    def cast(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.float() for x in args)

    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and p.dtype != torch.float32]
        if own:
            module.float().register_forward_pre_hook(cast)


def _decays(name: str, parameter: Tensor) -> bool:
    """As in the study: matrices, but not IA3's vectors, which peft keeps as matrices of one row."""
    return parameter.dim() > 1 and "ia3_l" not in name


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
