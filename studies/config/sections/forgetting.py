"""The section about rows that a model should not forget while it learns the study's task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from autopeft.search_space.domains import MOST
from autopeft.search_space.metrics import FORGETTING
from autopeft.search_space.problem import COSTS
from autopeft.studies.config.sections.base import Section
from autopeft.studies.config.source import PlacedProblem

if TYPE_CHECKING:
    from autopeft.evaluators.data.retained import RetainedConfig
    from autopeft.evaluators.rows import DataConfig

PROSE = "embedded-prose"
SECTION = "forgetting"


class ForgettingSettings(Section):
    """Retained rows: the objective forgetting is what a training adds to the loss of the untouched model on them."""

    source: Literal["embedded-prose", "files"] = Field(
        description="embedded-prose (paragraphs of documentation, for causal-lm) or files: rows of the same task"
    )
    file: str | None = Field(
        default=None,
        min_length=1,
        description="file (.jsonl, .json, .csv, .parquet) with the columns of data; a random half of its rows, always"
        " the same, is for the final test",
    )
    max_rows: Annotated[int, Field(ge=4, le=MOST)] | None = Field(
        default=None, description="size of a fixed random subset of the rows, both halves together; null: all rows"
    )

    def for_loading(self) -> RetainedConfig:
        """Return the argument of `with_retained`."""
        from autopeft.evaluators.data.retained import RetainedConfig

        return RetainedConfig(source=self.source, file=self.file, max_rows=self.max_rows)


def forgetting_problems(
    section: ForgettingSettings | None, objectives: Sequence[str], task: str, data: DataConfig
) -> Iterator[PlacedProblem]:
    """Yield the problems of the section, and of the objective `forgetting` beside the other `objectives`."""
    if data.source == PROSE:
        yield ("data", "source"), f"{PROSE} has rows to retain and none to learn from: set it in {SECTION}.source"
    place = next((i for i, name in enumerate(objectives) if name == FORGETTING.name), None)
    if place is not None and section is None:
        what = f"needs the section {SECTION}, which says what is to be retained, such as {{source: {PROSE}}}"
        yield ("objectives", place), f"{FORGETTING.name} {what}"
    if place is not None and next((n for n in objectives if n not in COSTS), None) == FORGETTING.name:
        what = "cannot be the first quality: the model that learns least forgets least; name what it is to learn before"
        yield ("objectives", place), f"{FORGETTING.name} {what}"
    if section is None:
        return
    if place is None:
        yield (SECTION,), f"has no effect without the objective {FORGETTING.name}"
    if section.source == PROSE:
        if section.file is not None:
            yield (SECTION, "file"), f"cannot be set with {PROSE}; to use your file, set {SECTION}.source to files"
        if task != "causal-lm":
            what = f"is text without labels, for causal-lm: set files, and {SECTION}.file to rows of {task}"
            yield (SECTION, "source"), f"{PROSE} {what}"
        elif data.domain_field is not None:
            what = (
                f"has no column {data.domain_field!r}, which data.domain names: set files, with rows of these domains"
            )
            yield (SECTION, "source"), f"{PROSE} {what}"
    elif section.file is None:
        yield (SECTION, "file"), "is missing: set it to a file (.jsonl, .json, .csv or .parquet)"
