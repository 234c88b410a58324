"""Tensors that sites share, and tensors that are not trained: they exist once, count once and are stored once."""

from __future__ import annotations

from random import Random

import pytest
import torch

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.shared_weights import SharedWeights
from autopeft.evaluators.training.optimizer import PackedAdamW
from autopeft.search_space.adapters import AdapterSpec, Lora, Shira, Vera
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.declaration import AdapterChoice, SpaceError
from autopeft.search_space.domains import Choice
from autopeft.search_space.parameter import Parameter
from autopeft.search_space.problem import declared_costs
from autopeft.search_space.runtime.bank import Bank
from autopeft.search_space.runtime.init import initialise, stream
from autopeft.search_space.sharing import SharedKey
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.search_space.training import Training
from autopeft.searchers.bo.encoding import Encoding
from autopeft.testing.models import tiny, tokens

from ..support.tied import Tied, tied  # noqa: F401  (a fixture)
from .adapters.test_adapters import assert_slots_equal_alone, noisy

pytestmark = pytest.mark.usefixtures("tied")
every_family = pytest.mark.parametrize("family", ["bert", "llama-causal", "gpt2"])


def mixed(backbone: Backbone, kind: type[AdapterSpec], *sizes: int, every: int = 1) -> Architecture:
    """At every so many-th site of the type, in sizes that take turns, beside other adapters."""
    sites = [site for site in backbone.sites if site.role in Tied.default_roles][::every]
    return Architecture.of(
        {
            site.name: [kind(rank=sizes[i % len(sizes)]), Lora(rank=2)]  # type: ignore[call-arg]
            for i, site in enumerate(sites)
        }
    )


def several(backbone: Backbone) -> list[Architecture]:
    return [
        mixed(backbone, Tied, 2, 4),
        mixed(backbone, Vera, 3, 1),
        mixed(backbone, Tied, 3, every=3),
        mixed(backbone, Vera, 3, every=3),
        Architecture(),
    ]


@every_family
def test_counts_are_those_of_the_tensors_that_there_are(family: str) -> None:
    model, backbone = tiny(family)
    architectures = several(backbone)
    for architecture in architectures[:-1]:
        with Attachment(model, backbone, [architecture], [1]) as attachment:
            held = {id(value): value.numel() for value, _ in attachment.trainable()}
            heads = sum(v.numel() for name, v in attachment.state().items() if name.startswith("head."))
            adapters = {name: v for name, v in attachment.state().items() if not name.startswith("head.")}
            assert len(held) == len(list(attachment.trainable())), "each once"
            assert sum(held.values()) - heads == architecture.num_params(backbone) == attachment.num_adapter_params()
            assert sum(v.nbytes for v in adapters.values()) == architecture.stored_bytes(backbone)
            all_values = sum(parameter.numel() for parameter in attachment.parameters()) - heads
            assert all_values == architecture.total_params(backbone) == architecture.active_params(backbone)
            optimizer = PackedAdamW(attachment, [Training(learning_rate=0.1)])
            assert sum(buffers.values.numel() for buffers in optimizer._buffers) == sum(held.values())
    seeds = list(range(len(architectures)))
    with Attachment(model, backbone, architectures, seeds) as attachment:
        optimizer = PackedAdamW(attachment, [Training(learning_rate=0.1)] * len(seeds))
        for k, architecture in enumerate(architectures):
            own = {name: v for name, v in optimizer.parts(k)["first"].items() if not name.startswith("head.")}
            assert sum(part.numel() for part in own.values()) == architecture.num_params(backbone)


def test_what_is_shared_exists_once() -> None:
    model, backbone = tiny("llama-causal")
    with Attachment(model, backbone, several(backbone), range(5)) as attachment:
        for bank in attachment.banks:
            for name in bank.rows:
                kind = bank.specs[0].kind
                scope = f"{bank.site.in_features}x{bank.site.out_features}" if name == "g" else "model"
                pool = attachment.pools[SharedKey(scope, kind, name, 0 if kind == "vera" else None)]
                assert bank.values[name] is pool.value
        one = attachment.pools[SharedKey("model", "vera", "A", 0)].value
        assert not one.requires_grad
        assert len(one) == 1, "alike in both slots"
        assert len(attachment.pools[SharedKey("model", "tied", "A")].value) == 2, "each slot trains its own"
        assert len({path for path in attachment.state(0) if path.startswith("shared.")}) == 1 + len(
            {(s.in_features, s.out_features) for s in backbone.sites if s.role in Tied.default_roles}
        )


@every_family
def test_a_slot_alone_is_the_slot_in_a_pack(family: str) -> None:
    model, backbone = tiny(family)
    assert_slots_equal_alone(model, backbone, several(backbone))


@every_family
@pytest.mark.parametrize("kind", [Tied, Vera])
def test_merged_is_unmerged_and_loads_into_any_seed(family: str, kind: type[AdapterSpec]) -> None:
    model, backbone = tiny(family)
    architecture = mixed(backbone, kind, 2, 3)
    with Attachment(model, backbone, [architecture], [1]) as attachment:
        attachment.load_state(noisy(attachment))
        state = attachment.eval().state()
        apart = model(tokens()).logits
        with attachment.merged(), attachment.bare():
            torch.testing.assert_close(model(tokens()).logits, apart, atol=1e-5, rtol=1e-5)
    with Attachment(model, backbone, [architecture], [2], draw=False) as attachment:
        attachment.load_state(state)
        attachment.eval()
        assert torch.equal(model(tokens()).logits, apart)
        for name in [name for name in state if name.startswith("shared.")]:
            with pytest.raises(ValueError, match=name):
                attachment.load_state(state | {name: state[name][..., :1]})
            with pytest.raises(KeyError):
                attachment.load_state({key: value for key, value in state.items() if key != name})


def space_of(backbone: Backbone) -> SearchSpace:
    sizes = Choice.of([0, 1, 2, 4])
    return SearchSpace(
        backbone=backbone,
        adapters={
            "tied": AdapterChoice(kind="tied", fields={"rank": sizes}, vary={"rank": "layer"}),
            "more": AdapterChoice(kind="tied", at=("attn.o",), placement="layer", fields={"rank": Choice.of([1, 5])}),
            "vera": AdapterChoice(kind="vera", fields={"rank": sizes}, vary={"rank": "site"}),
            "lora": AdapterChoice(kind="lora", fields={"rank": sizes}),
        },
    )


def test_costs_of_many_are_those_of_each() -> None:
    backbone = tiny("llama-causal")[1]
    space = space_of(backbone)
    encoding = Encoding(space)
    points = [*(space.sample(Random(i)) for i in range(60)), space.smallest(), space.largest()]
    rows = encoding.rows(points)
    costs = encoding.costs(rows, encoding.active(rows))
    for i, point in enumerate(points):
        architecture = space.decode(point).architecture
        assert {name: column[i] for name, column in costs.items()} == declared_costs(architecture, backbone)


def test_subnets_read_what_the_supernet_shares() -> None:
    model, backbone = tiny("llama-causal")
    space = space_of(backbone)
    weights = SharedWeights(model, space, seed=0, num_banks=2)
    trained = list(weights.trainable())
    assert len({id(value) for value, _ in trained}) == len(trained)
    with torch.no_grad():
        for value, _ in trained:
            value.add_(0.1 * torch.randn_like(value))
    for i in range(4):
        found = [space.decode(space.sample(Random(10 * i + j))).architecture for j in range(2)]
        with Attachment(model, backbone, found, [0, 0], shared=weights, bank_of_slot=[0, 1]) as attachment:
            attachment.eval()
            packed = model(tokens().repeat(2, 1)).logits.unflatten(0, (2, -1))
            states = [attachment.state(k) for k in range(2)]
            frozen = {
                (bank.site.name, k): {name: bank.of_slot(j)[name].clone() for name in ("A", "B")}
                for bank in attachment.banks
                if bank.specs[0].kind == "vera"
                for j, k in enumerate(bank.slots_served)
            }
        for k, architecture in enumerate(found):
            with Attachment(model, backbone, [architecture], [5]) as attachment:
                attachment.load_state(states[k])
                # A supernet's matrices are larger, so that they are others than a stand-alone candidate draws.
                for bank in [bank for bank in attachment.banks if bank.specs[0].kind == "vera"]:
                    bank.load_slot(0, bank.of_slot(0) | frozen[bank.site.name, k])
                attachment.eval()
                torch.testing.assert_close(model(tokens()).logits, packed[k], atol=1e-5, rtol=1e-5)


def test_frozen_matrices_are_the_same_on_every_machine() -> None:
    """They are in no file: a torch that drew others would make files of before worthless."""
    model, backbone = tiny("bert")
    with Attachment(model, backbone, [Architecture.of({"layers.0.attn.q": [Vera(rank=2)]})], [1]) as attachment:
        a, b = (attachment.banks[0].of_slot(0)[name].flatten()[:3].tolist() for name in ("A", "B"))
    assert a == pytest.approx(EXPECTED[0], rel=1e-5)
    assert b == pytest.approx(EXPECTED[1], rel=1e-5)


EXPECTED = ([0.2063439, -0.2226313, -0.0582791], [-0.4724134, 0.7618057, 0.0273515])


@pytest.mark.parametrize(
    "fields",
    [{"key": 1}, {"indices": True}, {"given": ("a",)}, {"scope": "model", "per_expert": True},
     {"scope": "shape", "trainable": False, "indices": True}],
)  # fmt: skip
def test_refuses_what_cannot_be(fields: dict) -> None:
    with pytest.raises(ValueError, match=r"needs trainable=False|shared parameter"):
        Parameter(shape=(1,), **fields)


# Indices


def test_indices_are_of_the_slot_and_in_its_state() -> None:
    model, backbone = tiny("bert")
    architectures = [Architecture.of({"layers.0.attn.q": [Shira(rank=rank)]}) for rank in (2, 3, 3)]
    with Attachment(model, backbone, architectures, [1, 2, 3]) as attachment:
        states = [attachment.state(k) for k in range(3)]
        assert not any(value.dtype == torch.int32 for value, _ in attachment.trainable())
    places = [state["layers.0.attn.q/shira/places"] for state in states]
    assert [len(own) for own in places] == [2 * 48, 3 * 48, 3 * 48]
    assert places[0].dtype == torch.int32
    assert all(len(own.unique()) == len(own) and own.min() >= 0 and own.max() < 24 * 24 for own in places)
    assert not torch.equal(*places[1:])
    stored = sum(v.nbytes for name, v in states[0].items() if not name.startswith("head."))
    assert stored == architectures[0].stored_bytes(backbone) == 8 * architectures[0].num_params(backbone)
    with Attachment(model, backbone, [architectures[0]], [9], draw=False) as attachment:
        attachment.load_state(states[0])
        assert torch.equal(attachment.banks[0].of_slot(0)["places"], places[0])
        assert "indices_places" in dict(attachment.banks[0].named_buffers()), "which a module moves along"


def test_a_smaller_one_reads_the_first_places_of_a_larger() -> None:
    model, backbone = tiny("bert")
    site = backbone.site("layers.0.attn.q")
    bank = Bank(site, [Shira(rank=1), Shira(rank=4)], model.get_submodule(site.module), [1, 2], bank_of_slot=[0, 0])
    small, large = (bank.of_slot(k)["places"] for k in range(2))
    assert torch.equal(small, large[:48])
    assert len(large.unique()) == 4 * 48


@pytest.mark.parametrize("count", [1, 50, 600, 2000])
def test_places_are_different_and_anywhere(count: int) -> None:
    parameter = Parameter(shape=(count,), init="places", trainable=False, indices=True)
    base = torch.nn.Linear(50, 40)
    found = initialise(parameter, stream(count), base)
    assert found.dtype == torch.int32
    assert len(found) == len(found.unique()) == count
    assert torch.equal(found, initialise(parameter, stream(count), base))
    if count >= 50:
        assert found.min() < 200
        assert found.max() >= 1800
        assert not torch.equal(found, found.sort().values)


def test_more_places_than_a_weight_has_are_refused() -> None:
    model, backbone = tiny("bert")
    with pytest.raises(ValueError, match="'shira' cannot be attached at"):
        Attachment(model, backbone, [Architecture.of({"layers.0.attn.q": [Shira(rank=13)]})], [1])


def test_a_space_takes_the_sites_where_its_sizes_fit() -> None:
    backbone = tiny("llama-causal")[1]  # values have 24 to 12 features: 288 places, 36 for a rank

    def space(rank: object) -> SearchSpace:
        return SearchSpace(
            backbone=backbone,
            adapters={"s": AdapterChoice(kind="shira", at=("attn.q", "attn.v"), fields={"rank": rank})},  # type: ignore[dict-item]
        )

    assert {place.site.role for place in space(Choice.of([0, 4, 8])).placements} == {"attn.q", "attn.v"}
    assert {place.site.role for place in space(9).placements} == {"attn.q"}
    with pytest.raises(
        SpaceError, match=r"s.rank: 9 is too large for layers.0.attn.v: 24 input and 12 output features"
    ):
        space(Choice.of([0, 4, 9]))


def test_adapters_side_by_side_share_as_sites_do() -> None:
    model, backbone = tiny("bert")
    twins = Architecture.of({"layers.0.attn.q": [Tied(rank=2), Tied(rank=3)], "layers.1.attn.q": [Tied(rank=2)]})
    assert_slots_equal_alone(model, backbone, [twins, mixed(backbone, Tied, 2)])
    with Attachment(model, backbone, [twins], [1]) as attachment:
        assert attachment.num_adapter_params() == twins.num_params(backbone)
        assert attachment.state()["shared.model/tied/A"].shape == (3, 24)
