"""The public interface: names for notebooks, each imported at its first use.

The packages are next to this folder in a checkout, and inside it in an installed wheel.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopeft.search_space.declaration import AdapterChoice, OneOf
    from autopeft.search_space.domains import Choice, Float, Int
    from autopeft.studies.errors import UserError
    from autopeft.studies.notebook import Member, Result, Study

__version__ = "0.1.0"

#: The module of each public name.
_EXPORTS = {
    "AdapterChoice": "autopeft.search_space.declaration",
    "OneOf": "autopeft.search_space.declaration",
    "Choice": "autopeft.search_space.domains",
    "Float": "autopeft.search_space.domains",
    "Int": "autopeft.search_space.domains",
    "UserError": "autopeft.studies.errors",
    "Member": "autopeft.studies.notebook",
    "Result": "autopeft.studies.notebook",
    "Study": "autopeft.studies.notebook",
}

__all__ = [
    "AdapterChoice",
    "Choice",
    "Float",
    "Int",
    "Member",
    "OneOf",
    "Result",
    "Study",
    "UserError",
    "__version__",
]

_HERE = os.path.dirname(os.path.realpath(__file__))
if not os.path.isdir(os.path.join(_HERE, "studies")):
    # The finder of an editable install finds every listed package but not the namespace package `kernels`.
    __path__.append(os.path.dirname(_HERE))


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_EXPORTS[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
