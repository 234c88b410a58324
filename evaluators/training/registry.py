"""The training evaluators by their name in study files, `evaluation.evaluator`."""

from __future__ import annotations

from autopeft.evaluators.training.base import TrainingEvaluator
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.registry import Registry

EVALUATORS: Registry[type[TrainingEvaluator]] = Registry(
    "autopeft.evaluators", TrainingEvaluator, "name", (PackedEvaluator, TrainEvaluator)
)
