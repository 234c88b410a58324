"""Types of the sections: strictness, ranges, settings with one or several values, numbers with limits."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    Tag,
    WithJsonSchema,
    model_serializer,
)

from autopeft.search_space.domains import MOST

Positive = Annotated[float, Field(gt=0)]
#: A number of trials, runs or members.
Count = Annotated[int, Field(ge=1, le=MOST)]
#: Minutes or seconds.
Duration = Annotated[float, Field(gt=0, le=1e9)]
#: Adapters, groups or metrics by name, and members of a group.
MOST_NAMED = 100
#: Names become parts of the names of genes, where dots are separators.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Section(BaseModel):
    """Base of the sections: strict types and no unknown keys."""

    # Strict: a trial count of "40" or of 40.5 is a mistake, not a number to convert.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class GrowingSection(Section):
    """A section with settings that were added after the first version of the file.

    They are left out where they say what was done before, so that older studies, scores and recipes keep their keys.
    """

    #: Those settings, each with the values that say what was done before.
    later: ClassVar[Mapping[str, tuple[str | bool | None, ...]]] = {}

    @model_serializer(mode="wrap")
    def _serialize(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in default(self).items() if value not in self.later.get(name, ())}


class Range(Section):
    """Every number from low to high."""

    # Both types keep whole numbers whole; float comes first, so that a message about a wrong type says "a number".
    low: float | int = Field(description="smallest value")
    high: float | int = Field(description="largest value")
    log: bool = Field(default=False, description="spread over orders of magnitude")
    step: int | None = Field(default=None, ge=1, description="distance between whole numbers")


def _scalar(value: Any) -> Any:
    if not isinstance(value, (bool, int, float, str)) or (isinstance(value, float) and not isfinite(value)):
        raise ValueError("must be a number, a word, true or false")
    return value


def _shape(value: Any) -> str:
    if isinstance(value, (dict, Range)):
        return "Range"
    return "list" if isinstance(value, (list, tuple)) else "value"


Scalar = Annotated[Any, AfterValidator(_scalar), WithJsonSchema({"type": ["number", "string", "boolean"]})]
#: A value (fixed), a list of values (choose one) or a range.
Setting = Annotated[
    Annotated[Range, Tag("Range")] | Annotated[tuple[Scalar, ...], Tag("list")] | Annotated[Scalar, Tag("value")],
    Discriminator(_shape),
]

Share = Annotated[float, Field(gt=0, le=1)]
