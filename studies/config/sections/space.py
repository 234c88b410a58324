"""The section of the search space."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
)

from autopeft.search_space.backbones.backbone import MOST_LAYERS
from autopeft.search_space.declaration import Granularity, Variation
from autopeft.studies.config.sections.base import (
    MOST_NAMED,
    Name,
    Section,
    Setting,
)


class AdapterSettings(Section):
    """One adapter type in the space. It takes the fields of its kind as well, each a value, list or range."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Setting] = Field(init=False)

    kind: str | None = Field(default=None, description="adapter type; default: the name of this entry")
    at: tuple[str, ...] = Field(default=(), description="roles of its possible sites; default: those of the type")
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description="restrict it to these layers"
    )
    placement: Granularity | None = Field(
        default=None, description="search for the places where it is on, at this granularity; null: always on"
    )
    vary: dict[str, Variation] = Field(
        default={},
        description="granularity of fields that are chosen per stage, layer or site; the rank of LoRAs also per expert",
    )
    given: tuple[str, ...] = Field(
        default=(), description="folders of pretrained LoRAs in peft's format, which become frozen experts"
    )
    router_per: Literal["site", "layer"] = Field(
        default="site", description="for mixtures: one router per site, or one that all sites of a layer share"
    )

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of its kind that the file sets."""
        return self.__pydantic_extra__ or {}


class OneOfSettings(Section):
    """Exactly one of these adapters is present."""

    members: tuple[str, ...] = Field(min_length=1, max_length=MOST_NAMED, description="names of adapters of this space")
    per: Granularity = Field(default="model", description="how often the choice is made")
    optional: bool = Field(default=False, description="allow that none of them is present")


class SpaceSettings(Section):
    """Adapters with their possible sizes and places. A preset can be combined with your own adapters."""

    preset: str | None = Field(default=None, description="a published space to start from")
    adapters: dict[Name, AdapterSettings] = Field(default={}, max_length=MOST_NAMED, description="adapters by name")
    one_of: dict[Name, OneOfSettings] = Field(
        default={}, max_length=MOST_NAMED, description="groups that exclude each other, by name"
    )
    layer_gate: bool | None = Field(default=None, description="one on/off bit per layer that all adapters share")
    stages: int | None = Field(
        default=None,
        ge=1,
        le=MOST_LAYERS,
        description="number of equal groups of layers for the granularity stage; default: as in the preset, or 4",
    )
