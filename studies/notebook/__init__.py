"""Studies in Python, for notebooks, with the settings, engine and files of study files."""

from autopeft.studies.notebook.result import Member, Result
from autopeft.studies.notebook.study import Study

__all__ = ["Member", "Result", "Study"]
