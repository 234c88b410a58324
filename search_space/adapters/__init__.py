"""Adapter types, one file each. The CLI, the schema and the tables derive from the registry `ADAPTERS`.

The order of the registry is also the order in which several adapters act at one module, and in which they are merged:
DoRA comes first because it needs the backbone's own output, types that add to the output follow, and types that scale
the sum come last. Types that change the input stand between these, because all additions read the changed input; of
several that change the input, the last one acts first. `Mixture` is not in the registry: it combines experts of any
type that can be an expert.
"""

from __future__ import annotations

from typing import Any

from autopeft.search_space.adapters.adapter_bias import AdapterBias
from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.adapters.beft import Beft
from autopeft.search_space.adapters.biadaptformer import BiAdaptFormer
from autopeft.search_space.adapters.bitfit import Bitfit
from autopeft.search_space.adapters.boft import Boft
from autopeft.search_space.adapters.bottleneck import Bottleneck
from autopeft.search_space.adapters.c3a import C3a
from autopeft.search_space.adapters.compacter import Compacter
from autopeft.search_space.adapters.delora import Delora
from autopeft.search_space.adapters.dense import Dense
from autopeft.search_space.adapters.dora import Dora
from autopeft.search_space.adapters.eigenlorax import Eigenlorax
from autopeft.search_space.adapters.flora import Flora
from autopeft.search_space.adapters.full import Full
from autopeft.search_space.adapters.gralora import Gralora
from autopeft.search_space.adapters.hira import Hira
from autopeft.search_space.adapters.hra import Hra
from autopeft.search_space.adapters.hydra import Hydra
from autopeft.search_space.adapters.hyperformer import Hyperformer
from autopeft.search_space.adapters.ia3 import Ia3
from autopeft.search_space.adapters.lily import Lily
from autopeft.search_space.adapters.loha import Loha
from autopeft.search_space.adapters.lokr import Lokr
from autopeft.search_space.adapters.lora import Lora
from autopeft.search_space.adapters.miss import Miss
from autopeft.search_space.adapters.mixture import Mixture
from autopeft.search_space.adapters.mos import Mos
from autopeft.search_space.adapters.multilora import MultiLora
from autopeft.search_space.adapters.norm import Norm
from autopeft.search_space.adapters.oft import Oft
from autopeft.search_space.adapters.polyhistor import Polyhistor
from autopeft.search_space.adapters.prefix import Prefix
from autopeft.search_space.adapters.randlora import Randlora
from autopeft.search_space.adapters.road import Road
from autopeft.search_space.adapters.shira import Shira
from autopeft.search_space.adapters.sparse_adapter import SparseAdapter
from autopeft.search_space.adapters.spiel import Spiel
from autopeft.search_space.adapters.ssf import Ssf
from autopeft.search_space.adapters.vblora import Vblora
from autopeft.search_space.adapters.vera import Vera
from autopeft.search_space.adapters.vlpet import VlPet
from autopeft.search_space.registry import Registry

ADAPTERS: Registry[type[AdapterSpec]] = Registry(
    "autopeft.adapters",
    AdapterSpec,
    "kind",
    (
        *(Full, Dora, Hira),
        *(Lora, Vera, Dense, Shira, Spiel, Loha, Lokr, Miss, C3a, Gralora, Delora, Flora, Hydra, MultiLora),
        *(Randlora, Vblora, Mos, Lily, Eigenlorax),
        *(Oft, Boft, Hra),
        *(Norm, Bitfit, Beft, AdapterBias, Road, Ssf, Ia3),
        *(Bottleneck, SparseAdapter, BiAdaptFormer, Compacter, Hyperformer, Polyhistor, VlPet, Prefix),
    ),
)


def spec_from_dict(data: dict[str, Any]) -> AdapterSpec:
    """Return the adapter that `AdapterSpec.to_dict` wrote. Raises ValueError for an unknown kind, field or value."""
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind == Mixture.kind:
        return Mixture(**{**fields, "expert": spec_from_dict(fields["expert"])})
    if kind not in ADAPTERS:
        raise ValueError(f"unknown adapter kind {kind!r}; known: {', '.join(ADAPTERS)}")
    try:
        return ADAPTERS[kind](**fields)
    except TypeError as error:
        raise ValueError(f"adapter {kind}: {error}") from None


__all__ = [
    "ADAPTERS",
    "AdapterBias",
    "AdapterSpec",
    "Beft",
    "BiAdaptFormer",
    "Bitfit",
    "Boft",
    "Bottleneck",
    "C3a",
    "Compacter",
    "Delora",
    "Dense",
    "Dora",
    "Eigenlorax",
    "Flora",
    "Full",
    "Gralora",
    "Hira",
    "Hra",
    "Hydra",
    "Hyperformer",
    "Ia3",
    "Lily",
    "Loha",
    "Lokr",
    "Lora",
    "Miss",
    "Mixture",
    "Mos",
    "MultiLora",
    "Norm",
    "Oft",
    "Polyhistor",
    "Prefix",
    "Randlora",
    "Road",
    "Shira",
    "SparseAdapter",
    "Spiel",
    "Ssf",
    "Vblora",
    "Vera",
    "VlPet",
    "spec_from_dict",
]
