"""Genes: the decisions of a searcher, each with its domain and the condition under which it is active.

A gene is *active* when at least one site that it governs is switched on by all gates of a higher order. The order of
gates is: layer gate, type (`one_of`), placement, "size is not zero"; the fields of an adapter come last. One pass over
the genes in this order therefore determines the active ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopeft.search_space.domains import Domain, Value

#: A conjunction: the named genes are active and have these values.
Condition = frozenset[tuple[str, Value]]

#: Values of the active genes, by name.
Assignment = dict[str, Value]

TRAINING = "training."


@dataclass(frozen=True, slots=True, kw_only=True)
class Gene:
    """One decision. It is active if any of `conditions` holds; an empty conjunction always holds."""

    name: str
    domain: Domain
    conditions: frozenset[Condition] = frozenset({frozenset()})
    #: The adapter that the gene belongs to; None for layer gates, types (`one_of`) and training fields.
    adapter: str | None = None
    #: For an on/off gene of a size: the gene of that size; the two count as one choice in the cardinality.
    size: str | None = None

    @property
    def setting(self) -> str:
        """Name without the scope: "lora.rank", "training.epochs", the name of a group, "layers"."""
        words = self.name.split(".")
        return ".".join(words[: 1 if self.adapter is None and not self.name.startswith(TRAINING) else 2])

    def is_active(self, assignment: Mapping[str, Value]) -> bool:
        """Return whether the gene is active, given the values of the active genes before it."""
        return any(all(assignment.get(name) == value for name, value in condition) for condition in self.conditions)


@dataclass(frozen=True, slots=True)
class Gate:
    """A gene and the value that it needs for an adapter to be on at a site; see `Gene` for `adapter` and `size`."""

    gene: str
    value: Value
    adapter: str | None = None
    size: str | None = None
