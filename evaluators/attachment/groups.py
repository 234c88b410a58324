"""The adapters of the slots at one site, in groups that share a bank, in the order in which they act."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from autopeft.search_space.adapters import ADAPTERS, AdapterSpec
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Site

#: Slots whose adapters at a site share a structure; their adapters; the number of earlier adapters of this structure at
#: the site; and for each slot the number of its adapter, from 1, among adapters that need separate random streams.
Group = tuple[list[int], list[AdapterSpec], int, list[int]]


def groups_at(site: Site, architectures: Sequence[Architecture]) -> Iterator[Group]:
    """Yield groups in the order in which they act; see `ADAPTERS`. Raises ValueError for adapters that exclude others.

    `architectures`: one per slot.
    """
    groups: dict[tuple[Any, ...], Group] = {}
    for k, architecture in enumerate(architectures):
        seen: dict[tuple[Any, ...], int] = {}
        mixtures = 0
        specs_here = dict(architecture.adapters).get(site.name, ())
        for spec in specs_here:
            # Two adapters of one structure at one site form two groups with separate random streams. So do all
            # mixtures, because their routers and experts would otherwise start with the same values.
            structure = spec.structure()
            nth = seen[structure] = seen.get(structure, -1) + 1
            mixtures += spec.routed_by is not None
            if nth and not spec.repeatable:
                raise ValueError(f"two adapters of kind {spec.kind!r} at {site.name!r}: only one is allowed")
            slots, specs, _, numbers = groups.setdefault((structure, nth), ([], [], nth, []))
            slots.append(k)
            specs.append(spec)
            numbers.append(mixtures if spec.routed_by else nth + 1)
        readers = [spec.kind for spec in specs_here if spec.reads_weight]
        if len(readers) > 1:
            raise ValueError(f"{' and '.join(readers)} at {site.name!r}: only one may compute with the layer's weight")
    kinds = list(ADAPTERS)
    order = sorted(groups, key=lambda key: (kinds.index(key[0][0]), repr(key)))
    return iter(groups[key] for key in order)
