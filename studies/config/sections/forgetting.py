"""The section about rows that a model should not forget while it learns the study's task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from autopeft.search_space.domains import MOST
from autopeft.studies.config.sections.base import Section

if TYPE_CHECKING:
    from autopeft.evaluators.data.retained import RetainedConfig


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
