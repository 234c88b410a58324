"""User-defined metrics of generated texts: a function of prompts, generated texts and references."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from autopeft.search_space.metrics.base import MetricError
from autopeft.search_space.metrics.lm_eval import LmEval
from autopeft.search_space.metrics.own import Own, watched
from autopeft.search_space.metrics.texts import OfTexts


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnOfTexts(OfTexts):
    """A user-defined metric of texts. `place`: module:function; no code of the module runs before `loaded`.

    The function takes three lists of strings, the prompts, the generated texts and the references, [N] each, and
    returns a finite number per row. Their mean is the metric.
    """

    unit: str = ""
    maximise: bool = True
    place: str
    function: Callable[[Any, Any, Any], Any] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def declared(cls, name: str, place: str, maximise: bool = True) -> OwnOfTexts:
        """Return the metric without its function. Raises MetricError if `place` is not module:function."""
        found = Own.declared(name, place, maximise)
        summary = f"{place}, of prompts, generated texts and references"
        return cls(name=name, summary=summary, maximise=maximise, place=found.place)

    def loaded(self, folder: Path) -> OwnOfTexts:
        """Return the metric with its function, from a module in `folder` or an installed one. Raises MetricError."""
        function: Any = Own.declared(self.name, self.place).loaded(folder).function
        return replace(self, function=function)

    @override
    def of(self, prompts: Sequence[str], generated: Sequence[str], references: Sequence[str]) -> Sequence[float]:
        assert self.function is not None, "call `loaded` first"
        try:
            # Copies, because the function may change its arguments.
            with watched(f"the metric {self.name} ({self.place}{self._where()})", len(generated)):
                found = self.function(list(prompts), list(generated), list(references))
        except Exception as error:
            raise self._failed(f"raised {type(error).__name__}: {error}", error) from error
        try:
            numbers = [float(number) for number in found if not isinstance(number, str)]
            count = len(found)
        except (TypeError, ValueError, OverflowError):
            raise self._failed(f"returned {found!r:.80}, not a number per row") from None
        if count != len(generated):
            raise self._failed(f"returned {count:,} numbers for {len(generated):,} rows")
        wrong = next((number for number in numbers if not math.isfinite(number)), None)
        if wrong is not None or len(numbers) < count:
            what = "a text" if wrong is None else f"{wrong}, not a finite number"
            raise self._failed(f"returned {what} for a row")
        return numbers

    def _failed(self, what: str, error: Exception | None = None) -> MetricError:
        return MetricError(f"the metric {self.name} ({self.place}{self._where(error)}) {what}")

    def _where(self, error: Exception | None = None) -> str:
        """Return the file of the function, and the line that raised the error or else its first one."""
        code = getattr(inspect.unwrap(self.function), "__code__", None) if self.function else None
        if code is None:
            return ""
        line, trace = code.co_firstlineno, error.__traceback__ if error else None
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == code.co_filename:
                line = trace.tb_lineno
            trace = trace.tb_next
        return f", {code.co_filename}:{line}"


#: A user-defined metric of any kind.
UserDefined = Own | OwnOfTexts | LmEval


def user_defined(name: str, place: str, maximise: bool, of_texts: bool) -> Own | OwnOfTexts:
    """Return the metric of a module:function for a task that generates texts, or another one. Raises MetricError."""
    kind = OwnOfTexts if of_texts else Own
    return kind.declared(name, place, maximise)
