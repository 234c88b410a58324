"""Registries that other distributions can add to, by entry points.

A plug-in declares its class in its own `pyproject.toml`, under the name that study files and commands use:

    [project.entry-points."autopeft.searchers"]
    mine = "my_package.searcher:Mine"

Groups: `autopeft.adapters`, `.routers`, `.metrics`, `.tasks`, `.evaluators`, `.searchers` and `.exporters`.
docs/plugins.md has an example of each, and `autopeft.testing` the checks that a plug-in should pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


class PluginWarning(UserWarning):
    """A plug-in could not be loaded and was left out."""


class Registry(MutableMapping[str, T]):
    """Entries by name: those of this package in their order, then those of plug-ins by name.

    Plug-ins are loaded at the first lookup of a name that this package lacks, or at the first iteration. A plug-in
    that cannot be loaded or has the wrong type is left out with a PluginWarning.

    `base`: class of the entries. `attribute`: the attribute of an entry that holds its name. `own`: entries of this
    package. `instances`: the entries are objects; a plug-in names an
    object or its class.
    """

    def __init__(self, group: str, base: type, attribute: str, own: Iterable[T], *, instances: bool = False) -> None:
        self.group = group
        self._base, self._attribute, self._instances = base, attribute, instances
        self._own: dict[str, T] = {getattr(entry, attribute): entry for entry in own}
        self._plugins: dict[str, T] | None = None

    def __getitem__(self, name: str) -> T:
        return self._own[name] if name in self._own else self._loaded_plugins()[name]

    def __setitem__(self, name: str, entry: T) -> None:
        """Add an entry for this process only, as in a notebook or a test."""
        self._own[name] = entry

    def __delitem__(self, name: str) -> None:
        del (self._own if name in self._own else self._loaded_plugins())[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._own, *self._loaded_plugins()])

    def __len__(self) -> int:
        return len(self._own) + len(self._loaded_plugins())

    def __repr__(self) -> str:
        return f"Registry({self.group!r}: {', '.join(self)})"

    def _loaded_plugins(self) -> dict[str, T]:
        """Return the plug-ins of the group, loading them at the first call."""
        if self._plugins is None:
            from importlib.metadata import entry_points

            found: dict[str, T] = {}
            self._plugins = found  # set before loading: a plug-in may read this registry while it is imported
            for entry in sorted(entry_points(group=self.group), key=lambda entry: entry.name):
                try:
                    found[entry.name] = self._load(entry, {*self._own, *found})
                except Exception as error:
                    name = f"{entry.name} = {entry.value}" + (f" of {entry.dist.name}" if entry.dist else "")
                    reason = f"{type(error).__name__}: {error}"
                    message = f"{self.group}: the plug-in {name} could not be loaded and is ignored: {reason}"
                    warnings.warn(message, PluginWarning, stacklevel=3)
        return self._plugins

    def _load(self, entry: EntryPoint, taken: set[str]) -> T:
        if entry.name in taken:
            raise ValueError(f"the name {entry.name!r} is already registered")
        loaded: Any = entry.load()
        of_a_class = isinstance(loaded, type)
        if not (issubclass(loaded, self._base) if of_a_class else self._instances and isinstance(loaded, self._base)):
            raise TypeError(f"it is not a subclass of {self._base.__name__}")
        if of_a_class and self._instances:
            loaded = loaded()
        if getattr(loaded, self._attribute, None) != entry.name:
            raise ValueError(f"its `{self._attribute}` must be the name of the entry point, {entry.name!r}")
        return cast(T, loaded)
