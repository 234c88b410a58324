"""The rows of the table: each adapter type in a small and a large setting, from its `size_field` or from `SETTINGS`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from autopeft.search_space.adapters import ADAPTERS, AdapterSpec
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Backbone
from autopeft.search_space.spaces.presets import everywhere

SMALL, LARGE = "small", "large"
#: The row without an adapter, for models with a task head.
HEAD = "head"
#: The type whose step each step is compared with, in the row of the same size class.
REFERENCE = "lora"
#: Learning rates that every row is tuned over.
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Fields of a type that differ from their defaults, and where it sits (None: its default roles)."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    roles: tuple[str, ...] | None = None

    def __str__(self) -> str:
        parts = [f"{name} {value}" for name, value in self.fields.items()]
        return ", ".join([*parts, *(["every linear"] if self.roles == LINEAR_ROLES else [])])


#: Settings by size class of types without a `size_field`, or whose size is not what counts; a type that is in neither
#: has one small row.
SETTINGS: Mapping[str, Mapping[str, Setting]] = {
    "full": {LARGE: Setting()},
    "c3a": {SMALL: Setting(fields={"block_size": 256}), LARGE: Setting(fields={"block_size": 64})},
    "oft": {SMALL: Setting(fields={"block_size": 8}), LARGE: Setting(fields={"block_size": 32})},
    "boft": {
        SMALL: Setting(fields={"block_size": 4, "factors": 1}),
        LARGE: Setting(fields={"block_size": 8, "factors": 2}),
    },
    "mos": {SMALL: Setting(fields={"pool": 8, "rank": 2}), LARGE: Setting()},  # the rank is no number of parameters
    "road": {SMALL: Setting(fields={"variant": 1}), LARGE: Setting(fields={"variant": 4})},
    "beft": {SMALL: Setting(), LARGE: Setting(roles=LINEAR_ROLES)},
    "adapterbias": {SMALL: Setting(), LARGE: Setting(roles=LINEAR_ROLES)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A type in one setting. `size`: its size class."""

    kind: str
    size: str
    setting: Setting

    def place(self, backbone: Backbone) -> Architecture:
        """Return the architecture with the adapter wherever it fits; the empty one for `HEAD`."""
        if self.kind == HEAD:
            return Architecture()
        spec: AdapterSpec = ADAPTERS[self.kind](**self.setting.fields)
        return everywhere(backbone, spec, self.setting.roles)


def rows_of(kinds: Iterable[str]) -> list[Row]:
    """Return the rows of types: a quarter of the default size and the default size, or those of `SETTINGS`."""
    return [Row(kind=kind, size=size, setting=own) for kind in kinds for size, own in settings_of(kind).items()]


def settings_of(kind: str) -> Mapping[str, Setting]:
    """Return the settings of a type by size class."""
    name = None if kind == HEAD else ADAPTERS[kind].size_field
    if kind in SETTINGS or name is None:
        return SETTINGS.get(kind, {SMALL: Setting()})
    default = ADAPTERS[kind]().size
    assert default is not None
    return {SMALL: Setting(fields={name: max(1, default // 4)}), LARGE: Setting(fields={name: default})}


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the table: a study's model, rows and training, and the types by default (None: all)."""

    study: Path
    kinds: tuple[str, ...] | None = None

    @property
    def default_kinds(self) -> tuple[str, ...]:
        """The types that are measured where none are named; without those that are made of given LoRAs."""
        return self.kinds or (HEAD, *(kind for kind in ADAPTERS if not ADAPTERS[kind].takes_given))


_HERE = Path(str(files("autopeft.benchmarks.adapters")))
PARTS: Mapping[str, Part] = {
    "encoder": Part(_HERE / "encoder.yaml"),
    "llm": Part(
        _HERE / "llm.yaml",
        (
            *("dora", "hira", "lora", "vera", "shira", "c3a", "delora"),
            *("oft", "road", "ia3", "bottleneck", "prefix"),
        ),
    ),
}
