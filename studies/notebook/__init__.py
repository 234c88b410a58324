"""Studies from Python, as notebooks want them: the same settings, engine and files as those of a study file."""

from autopeft.studies.notebook.result import Member, Result
from autopeft.studies.notebook.study import Study

__all__ = ["Member", "Result", "Study"]
