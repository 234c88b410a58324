"""A task of EleutherAI's lm-evaluation-harness as a metric, on the documents of that task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from autopeft.search_space.metrics.base import OnOwnRows


@dataclass(frozen=True, slots=True, kw_only=True)
class LmEval(OnOwnRows):
    """The mean of a result of a task of lm-eval over its documents.

    `task`: its name. `folder`: that of its YAML file, relative to that of the study; None for lm-eval's own tasks.
    `result`: a metric of the task, or `metric,filter`; None for its first ones. `max_rows`: the size of a random subset
    of the documents, which is always the same; None for all. `chat_template`: whether prompts are turns of a chat.
    """

    package: ClassVar[str] = "lm_eval"
    unit: str = ""
    maximise: bool = True
    task: str
    folder: str | None = None
    result: str | None = None
    max_rows: int | None = None
    chat_template: bool = False

    @property
    def place(self) -> str:
        """The task, for messages."""
        return f"lm-eval task {self.task}"

    def loaded(self, folder: Path) -> LmEval:
        """Return the metric itself: the documents come with the rows."""
        return self
