"""Checks of a study file that need no model and no data."""

from autopeft.studies.config.checks.settings import problems_of, unknown_key

__all__ = ["problems_of", "unknown_key"]
