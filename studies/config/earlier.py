"""What ledgers and recipes of earlier versions mean where they lack a later setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from autopeft.studies.config.study_file import StudyFile

#: `data.train_on_turns` of every study before there was a choice.
FIRST_TURNS: Literal["last"] = "last"


def with_first_meanings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a ledger with what it did where it lacks a setting whose default is another one now."""
    from autopeft.evaluators.tasks import TASKS

    data, task = recorded.get("data", {}), str(recorded.get("task"))
    if task not in TASKS or not TASKS[task].has_turns or "train_on_turns" in data:
        return dict(recorded)
    return {**recorded, "data": {**data, "train_on_turns": FIRST_TURNS}}


def with_turns_of(recorded: StudyFile, settings: StudyFile) -> StudyFile:
    """Return settings with the recorded `data.train_on_turns`, unless the file sets it."""
    if "train_on_turns" in settings.data.model_fields_set:
        return settings
    data = settings.data.model_copy(update={"train_on_turns": recorded.data.train_on_turns})
    return settings.model_copy(update={"data": data})
