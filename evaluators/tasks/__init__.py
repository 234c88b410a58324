"""The registry of tasks by name; add a new task here."""

from __future__ import annotations

from autopeft.evaluators.tasks.base import Batch, Cut, Example, Prompted, Scored, Task, model_inputs
from autopeft.evaluators.tasks.causal_lm import CausalLM
from autopeft.evaluators.tasks.classification import Classification
from autopeft.search_space.registry import Registry

TASKS: Registry[type[Task]] = Registry("autopeft.tasks", Task, "name", (Classification, CausalLM))

__all__ = ["TASKS", "Batch", "Cut", "Example", "Prompted", "Scored", "Task", "model_inputs"]
