"""What a phase is, and what it is told: the same for the process that starts it and for the one that runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

#: One result: names to numbers, texts, truth values, or lists and dicts of these. A row that tests something has
#: `passed`.
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the kit. `module` has `measure(run: Run) -> Iterator[Row]`; `limit_s` is for a run of `FULL_MINUTES`.

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
    """Raised by a phase that cannot run on this machine, with the reason."""


@dataclass(slots=True)
class Run:
    """What a phase is told. `device`: "cuda", or "cpu" for toy sizes. `seconds`: after these it is killed."""

    device: str
    seconds: float
    #: What was not measured, for lack of time if it does not say otherwise.
    left_out: list[str] = field(default_factory=list)
    _begin: float = field(default_factory=time.monotonic)

    @property
    def toy(self) -> bool:
        """Whether the sizes only have to show that the code runs."""
        return self.device == "cpu"

    @property
    def seconds_left(self) -> float:
        return self.seconds - (time.monotonic() - self._begin)

    def has_time(self, what: str, seconds: float = 10.0) -> bool:
        """Whether `seconds` are left. If not, `what` is noted as left out."""
        if self.seconds_left >= seconds:
            return True
        self.left_out.append(what)
        return False


Measure = Callable[[Run], Iterator[Row]]
