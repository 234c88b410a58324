"""User-defined metrics: a function in a module beside the study file, or in an installed one."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from autopeft.search_space.metrics.base import PREDICTIONS, TARGETS, MetricError, OverSet
from autopeft.search_space.spelling import did_you_mean

if TYPE_CHECKING:
    from autopeft.search_space.metrics.base import Indices

logger = logging.getLogger(__name__)
#: Seconds after which a user's function is named as slow; then again after twice as many, and so on.
SLOW_S = 30.0
#: The module of a notebook or an interactive session.
SESSION = "__main__"
_PLACE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Own(OverSet):
    """A user-defined metric. `place`: module:function; no code of the module runs before `loaded`.

    The function takes two integer arrays, targets and predictions, and returns a finite number. They are indices of
    labels, [N] each, or for examples with any number of labels 1 and 0 per label, [N, C] each. The result must not
    depend on the order of the examples.
    """

    forms: ClassVar[tuple[tuple[str, str], ...]] = (*OverSet.forms, (TARGETS, PREDICTIONS))

    unit: str = ""
    maximise: bool = True
    place: str
    function: Callable[[Any, Any], Any] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def declared(cls, name: str, place: str, maximise: bool = True) -> Own:
        """Return the metric without its function. Raises MetricError if `place` is not module:function."""
        if not _PLACE.fullmatch(place):
            raise MetricError(f"{place!r} does not have the form module:function, such as my_module:my_score")
        return cls(name=name, summary=f"{place}, of targets and predictions", maximise=maximise, place=place)

    def loaded(self, folder: Path) -> Own:
        """Return the metric with its function, from a module in `folder` or an installed one. Raises MetricError."""
        module_name, name = self.place.split(":")
        module = _module(module_name, folder)
        found = getattr(module, name, None)
        if not callable(found) and module_name == SESSION:
            raise MetricError(
                f"the function {name} was defined in a notebook or a Python session and does not exist in this process:"
                " define it again and continue with autopeft.Study, or start a new study with the function in a module"
            )
        if not callable(found):
            known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise MetricError(f"the module {module_name} has no function {name!r}{did_you_mean(name, known)}")
        return Own(name=self.name, summary=self.summary, maximise=self.maximise, place=self.place, function=found)

    @override
    def of(self, targets: Indices, predictions: Indices) -> float:
        assert self.function is not None, "call `loaded` first"
        try:
            # Copies, because the function may change its arguments.
            with watched(f"the metric {self.name} ({self.place})", len(targets)):
                found = self.function(targets.copy(), predictions.copy())
        except Exception as error:
            raise MetricError(
                f"the metric {self.name} ({self.place}) raised {type(error).__name__}: {error}"
            ) from error
        with suppress(TypeError, ValueError, OverflowError):
            if not isinstance(found, str) and math.isfinite(value := float(found)):
                return value
        raise MetricError(f"the metric {self.name} ({self.place}) returned {found!r:.80}, not a finite number")


@contextmanager
def watched(metric: str, num_rows: int) -> Iterator[None]:
    """Warn while a user's function runs for long: nothing can end it but the end of the process."""
    ended, start_s = threading.Event(), SLOW_S

    def warn() -> None:
        seconds = start_s
        while not ended.wait(seconds if seconds == start_s else seconds / 2):
            logger.warning(
                "%s has run for %g s on %s rows, and the study waits for it: if it never ends, interrupt the study,"
                " mend the function and resume",
                *(metric, seconds, f"{num_rows:,}"),
            )
            seconds *= 2

    threading.Thread(target=warn, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def place_of(function: Callable[[Any, Any], Any]) -> str:
    """Return the module:function under which `Own.loaded` finds a function again.

    A function of a notebook or session is found in its process alone. Raises MetricError for a function that no module
    has under its name, as a lambda.
    """
    module_name, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    place = f"{module_name}:{name}"
    if not _PLACE.fullmatch(place) or getattr(sys.modules.get(str(module_name)), name, None) is not function:
        raise MetricError(
            f"{function!r:.80} cannot be imported by its name: define it with def, outside of functions and classes"
        )
    return place


def _module(name: str, folder: Path) -> ModuleType:
    """Import the module afresh.

    Another study may have a module of the same name, and this one may have been edited since the last import.
    """
    file = folder / f"{name}.py"
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        if not os.path.isfile(file):  # False for a name that is too long
            return importlib.import_module(name)
        unique = f"_own_metric_{sha256(str(file).encode()).hexdigest()[:12]}_{name}"
        spec = importlib.util.spec_from_file_location(unique, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[unique] = module  # dataclasses look up their module there
        spec.loader.exec_module(module)
        return module
    except ModuleNotFoundError as error:
        if error.name != name:
            raise MetricError(f"the module {name} cannot be imported: {error}") from error
        raise MetricError(f"no module {name}: put {name}.py into {folder}, or install it") from error
    except (Exception, SystemExit) as error:
        raise MetricError(f"the module {name} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(folder))
