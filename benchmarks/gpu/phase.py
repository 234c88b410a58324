"""Phases and their runs: shared by the process that starts a phase and the one that runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

#: One result: names to numbers, texts, booleans, or lists and dicts of these. The row of a test has `passed`.
ResultRow = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the kit.

    `module` has `measure`, of type `Measure`; `limit_s` is for a run of `FULL_MINUTES`.

    `interpreted`: without a GPU its Triton kernels run in Triton's interpreter, which is chosen before triton is
    imported and for a whole process.
    """

    name: str
    module: str
    limit_s: float
    summary: str
    interpreted: bool = False


#: The run that the limits of the phases are written for.
FULL_MINUTES = 8.0


class Skipped(Exception):  # noqa: N818 - control flow
    """A phase cannot run on this machine, for the given reason."""


@dataclass(slots=True)
class Run:
    """Arguments of a phase. `device`: "cuda", or "cpu" for toy sizes. `seconds`: the limit at which it is killed."""

    device: str
    seconds: float
    #: Measurements that were left out, for lack of time unless they give another reason.
    left_out: list[str] = field(default_factory=list)
    _begin: float = field(default_factory=time.monotonic)

    @property
    def toy(self) -> bool:
        """Whether this is a dry run at toy sizes."""
        return self.device == "cpu"

    @property
    def seconds_left(self) -> float:
        """Seconds until the limit."""
        return self.seconds - (time.monotonic() - self._begin)

    def has_time(self, what: str, seconds: float = 10.0) -> bool:
        """Return whether `seconds` are left. If not, record `what` as left out."""
        if self.seconds_left >= seconds:
            return True
        self.left_out.append(what)
        return False


Measure = Callable[[Run], Iterator[ResultRow]]
