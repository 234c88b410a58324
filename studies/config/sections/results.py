"""The sections about results: the recommendation and the tracking."""

from __future__ import annotations

from pydantic import (
    Field,
)

from autopeft.studies.config.sections.base import (
    Positive,
    Section,
)


class RecommendSettings(Section):
    """Which member of the front is recommended: the cheapest one whose quality is shown to be as good as the best."""

    within: Positive | None = Field(
        default=None,
        description="loss of quality that counts as none, in the unit of the first quality among the objectives;"
        " null: 0.01 (a point) of a share such as accuracy, 1 % of the best value of other metrics",
    )


class TrackingSettings(Section):
    """Tracking by MLflow."""

    enabled: bool = Field(default=True, description="log the study to MLflow")
    uri: str | None = Field(
        default=None,
        min_length=1,
        description="URI of an MLflow server, database or folder, paths relative to this file;"
        " default: mlflow.db in the output folder",
    )
    experiment: str | None = Field(default=None, description="MLflow experiment; default: the name of the study")
