"""Genes: the decisions a searcher makes, each with its domain and the condition under which it matters.

A gene is *active* when some site that it governs is switched on by all gates of a higher order. Gates come in the order
layer gate, type (`one_of`), placement, "size is not zero"; the fields of an adapter come last. So one pass over the
genes, in order, settles which of them count.
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
    """`conditions`: the gene is active if any of them holds (an empty conjunction always does)."""

    name: str
    domain: Domain
    conditions: frozenset[Condition] = frozenset({frozenset()})
    #: The adapter whose gene it is; None for layer gates, types (`one_of`) and the training.
    adapter: str | None = None
    #: For "is it on": the gene of the size, with which it is counted as one choice.
    size: str | None = None

    @property
    def setting(self) -> str:
        """Its name without the scope: "lora.rank", "training.epochs", a group's name, "layers"."""
        words = self.name.split(".")
        return ".".join(words[: 1 if self.adapter is None and not self.name.startswith(TRAINING) else 2])

    def is_active(self, assignment: Mapping[str, Value]) -> bool:
        """Whether it matters, given the values of the genes before it (inactive ones absent)."""
        return any(all(assignment.get(name) == value for name, value in condition) for condition in self.conditions)


@dataclass(frozen=True, slots=True)
class Gate:
    """A gene and the value that it must have for an adapter to be on at some site; see `Gene` for the rest."""

    gene: str
    value: Value
    adapter: str | None = None
    size: str | None = None
