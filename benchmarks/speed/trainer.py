"""transformers' Trainer over a study's rows, as a careful user sets it up.

It has all optimisations that are free: the same minibatches in the same order as our evaluators, padding to the longest
row of a minibatch, fused AdamW, rows of similar length together in the scoring, no logging, no saving, no evaluation
but the last. It imports nothing from `studies`, so that it runs with little more than torch and transformers.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments
from typing_extensions import override

from autopeft.evaluators.base import Request
from autopeft.evaluators.training import batching
from autopeft.evaluators.training.base import EVALUATION_BATCH_SIZE, TrainingEvaluator
from autopeft.evaluators.training.schedule import rate


def order_trainer(evaluator: TrainingEvaluator, model: Any, request: Request, folder: str) -> OrderTrainer:
    """Make a Trainer that trains `model` as `evaluator` would train the request's candidate.

    `model`: with the candidate's adapters, on the evaluator's device; parameters that require a gradient are trained.
    `folder`: for the files of the Trainer.
    """
    training = evaluator.training(request.candidate)
    steps, full = evaluator.num_steps(request), evaluator.full_steps(training)
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
        use_cpu=evaluator.device.type == "cpu",
        dataloader_pin_memory=evaluator.device.type == "cuda",
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        log_level="error",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = OrderTrainer(
        model=model,
        args=arguments,
        compute_metrics=_means,
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: rate(step, full, training))),
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for the result
    trainer.evaluator, trainer.request, trainer.losses = evaluator, request, []
    return trainer


class OrderTrainer(Trainer):  # type: ignore[misc]  # transformers counts as untyped
    """Trainer with the task's loss and the study's order of the rows."""

    evaluator: TrainingEvaluator
    request: Request
    #: Loss of each step, on the device: reading them would wait for it.
    losses: list[Tensor]

    @override
    def get_train_dataloader(self) -> Any:
        order = batching.training_batches(
            self.evaluator.lengths["train"], self.args.per_device_train_batch_size, self.request.seed
        )
        return self._loader("train", list(islice(order, self.args.max_steps)))

    @override
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

    @override
    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        loss = self.evaluator.task.scores(_unwrapped(model), inputs)["loss"].mean()
        self.losses.append(loss.detach())
        return loss

    @override
    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, Tensor]:
        with torch.no_grad():
            found = self.evaluator.task.scores(_unwrapped(model), self._prepare_inputs(inputs))
        return None, torch.stack((found["loss"], found["accuracy"]), 1), found["loss"]


def _unwrapped(model: Any) -> Any:
    """Return the transformers model inside peft's, with the adapters in it.

    There the task finds the output layer, and avoids the logits of all tokens in this arm as in ours.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _means(prediction: Any) -> dict[str, float]:
    loss, accuracy = prediction.predictions.mean(0)
    return {"loss": float(loss), "accuracy": float(accuracy)}


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch off the dropout of a backbone, in place: before peft adds the adapters, whose own dropout stays."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def trained_in_float32(model: nn.Module) -> None:
    """Convert a trained task head to float32, in place.

    peft does so with its own parameters on a backbone of a lower precision.
    """

    def cast(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.float() for x in args)

    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and p.dtype != torch.float32]
        if own:
            module.float().register_forward_pre_hook(cast)


def _decays(name: str, parameter: Tensor) -> bool:
    """Whether a parameter decays, as in the study: matrices, but not IA3's vectors, peft's matrices of one row."""
    return parameter.dim() > 1 and "ia3_l" not in name
