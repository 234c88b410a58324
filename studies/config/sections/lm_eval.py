"""An entry of `metrics` that names a task of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from autopeft.search_space.domains import MOST
from autopeft.search_space.metrics import LmEval
from autopeft.studies.config.sections.base import Section


class LmEvalSettings(Section):
    """A task of lm-evaluation-harness as a metric of a language model: the mean of a result over its documents."""

    lm_eval: str = Field(min_length=1, description="name of the task")
    folder: str | None = Field(
        default=None,
        min_length=1,
        description="folder of the task's YAML file, relative to this file; null: a task that comes with lm-eval",
    )
    metric: str | None = Field(
        default=None,
        min_length=1,
        description="result of the task, such as acc_norm, or with a filter: exact_match,strict-match; null: the first",
    )
    max_rows: Annotated[int, Field(ge=4, le=MOST)] | None = Field(
        default=None, description="size of a fixed random subset of the documents, both parts together; null: all"
    )
    chat_template: bool = Field(default=False, description="write prompts as turns of a chat, by the model's template")

    def metric_of(self, name: str, maximise: bool) -> LmEval:
        """Return the metric of this name, without its documents."""
        settings = {key: getattr(self, key) for key in ("folder", "max_rows", "chat_template")}
        result = self.metric or "the first result"
        summary = f"{result} of the lm-eval task {self.lm_eval}, over documents of its own"
        return LmEval(name=name, maximise=maximise, summary=summary, task=self.lm_eval, result=self.metric, **settings)
