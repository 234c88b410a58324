"""Random declarations of spaces over a small backbone made by hand. No torch, no model."""

from __future__ import annotations

from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from autopeft.search_space import AdapterChoice, Choice, Float, Int, OneOf, SearchSpace
from autopeft.search_space.declaration import GRANULARITIES
from autopeft.search_space.domains import Domain
from autopeft.testing.spaces import SMALL

granularities = st.sampled_from(GRANULARITIES)
sizes = st.one_of(
    st.sets(st.sampled_from((0, 1, 2, 3, 4, 8)), min_size=1).filter(lambda s: s != {0}).map(lambda s: Choice.of([*s])),
    st.builds(Int, low=st.sampled_from((0, 1)), high=st.integers(2, 6)),
    st.just(Int(low=1, high=32, log=True)),
    st.just(Int(low=0, high=12, step=4)),
    st.integers(1, 4),
)
dropouts = st.sampled_from((0.0, 0.1, Float(low=0.0, high=0.3), Choice.of((0.0, 0.05))))
numbers = st.sampled_from((16.0, Float(low=1.0, high=64.0, log=True), Float(low=0.1, high=0.7), Choice.of((4.0, 8.0))))
activations = st.sampled_from((("relu",), ("relu", "gelu"), ("tanh", "silu", "none"))).map(lambda c: Choice(choices=c))
lora_fields = {"rank": sizes, "alpha": numbers, "dropout": dropouts,
               "scaling": st.just(Choice(choices=("alpha", "rslora")))}  # fmt: skip
#: Roles of the small backbone that a kind can take, and fields to search.
KINDS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "lora": (("attn.q", "attn.v", "mlp.up"), lora_fields),
    "dora": (("attn.q", "mlp.up"), {"rank": sizes}),
    "bottleneck": (("attn", "mlp"), {"size": sizes, "activation": activations, "scale": numbers, "dropout": dropouts,
                                     "form": st.just(Choice(choices=("serial", "parallel")))}),
    "prefix": (("attn",), {"length": sizes}),
    "bitfit": (("attn.q", "mlp.up", "norm"), {}),
    "norm": (("norm",), {}),
    "ia3": (("attn.v",), {}),
}  # fmt: skip
#: Of a mixture of LoRAs.
ranks = sizes.filter(lambda size: not isinstance(size, Domain) or not size.contains(0))
counts = st.sampled_from((1, 3, Choice.of((0, 2, 3)), Choice.of((1, 2)), Int(low=0, high=2), Int(low=1, high=3)))
expert_fields = {"shared_experts": st.sampled_from((1, Choice.of((0, 2)), Int(low=1, high=2))),
                 "top_k": st.sampled_from((1, Choice.of((1, 2)))),
                 "router": st.sampled_from((Choice(choices=("token", "uniform")), "soft"))}  # fmt: skip
trainings = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": st.sampled_from((1e-3, Float(low=1e-4, high=3e-2, log=True), Choice.of((1e-3, 1e-2)))),
        "batch_size": st.sampled_from((16, Int(low=8, high=64, log=True), Choice.of((16, 32)))),
        "weight_decay": st.sampled_from((0.0, Float(low=0.0, high=0.1))),
        "schedule": st.just(Choice(choices=("linear", "cosine"))),
    },
)


@st.composite
def choices(draw: st.DrawFn, placement: bool = True) -> AdapterChoice:
    kind = draw(st.sampled_from(sorted(KINDS)))
    roles, fields = KINDS[kind]
    chosen = draw(st.fixed_dictionaries({}, optional=fields))
    per_expert = False
    if kind == "lora" and draw(st.booleans()):
        chosen |= draw(st.fixed_dictionaries({"experts": counts}, optional=expert_fields))
        if chosen.get("router") == "soft":
            chosen.pop("shared_experts", None)
        if draw(st.booleans()):
            chosen["rank"] = draw(ranks)
            per_expert = isinstance(chosen["rank"], Domain)
    varying = [key for key, value in chosen.items() if isinstance(value, Domain)]
    vary = {key: draw(granularities) for key in varying if draw(st.booleans())}
    return AdapterChoice(
        kind=kind,
        at=tuple(draw(st.lists(st.sampled_from(roles), min_size=1, unique=True))),
        # A layer's norms are not the only ones: without a restriction there are sites outside the layers too.
        layers=draw(st.none() | st.lists(st.integers(0, 2), min_size=1, unique=True).map(tuple)),
        placement=draw(st.none() | granularities) if placement else None,
        fields=chosen,
        vary={**vary, "rank": "expert"} if per_expert else vary,
    )


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    """Several adapters, exclusive groups, a layer gate, placements and fields at every granularity."""
    grouped = draw(st.lists(st.lists(choices(placement=False), min_size=1, max_size=3), max_size=2))
    alone = draw(st.lists(choices(), min_size=0 if grouped else 1, max_size=2))
    # Two that compute with one weight are refused, unless a group chooses one of them.
    assume(
        sum(any(choice.kind == "dora" for choice in together) for together in (*grouped, *([one] for one in alone))) < 2
    )
    adapters = {f"a{i}": choice for i, choice in enumerate(alone)}
    groups = []
    for g, members in enumerate(grouped):
        names = {f"g{g}m{i}": choice for i, choice in enumerate(members)}
        adapters |= names
        groups.append(OneOf(name=f"g{g}", members=tuple(names), per=draw(granularities), optional=draw(st.booleans())))
    return SearchSpace(
        backbone=SMALL,
        adapters=adapters,
        one_of=groups,
        layer_gate=draw(st.booleans()),
        stages=draw(st.none() | st.integers(1, 3)),
        training=draw(trainings),
    )
