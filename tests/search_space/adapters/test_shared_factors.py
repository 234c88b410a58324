"""Low-rank updates with shared or frozen factors: what is shared, what stays, and what they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.shared_weights import SharedWeights
from autopeft.evaluators.training.optimizer import PackedAdamW
from autopeft.search_space.adapters import (
    AdapterSpec,
    Eigenlorax,
    Flora,
    Lily,
    Mos,
    Randlora,
    Vblora,
    Vera,
    spec_from_dict,
)
from autopeft.search_space.adapters.low_rank import LowRank
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.declaration import AdapterChoice, SpaceError
from autopeft.search_space.domains import Choice
from autopeft.search_space.runtime.bank import Bank
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.search_space.training import Training
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.source import StudyFileError
from autopeft.studies.exporters.peft_types import PEFT_TYPES
from autopeft.testing.adapters import noisy
from autopeft.testing.models import tiny, tokens

from ...studies.engine.test_study import run
from ...support.tiny_study import LABELS, save_study
from .test_given import lora_in
from .test_operators import IN, OUT, SITE, change_of, close, weight_and_bias

torch.set_num_threads(1)

SHARED = [
    Randlora(rank=8, alpha=16.0),
    Vblora(rank=2, vectors=9, vector_length=4),
    Mos(rank=3, pool=5),
    Lily(rank=3, expansions=2),
]
FROZEN = [*SHARED, Vera(rank=3), Eigenlorax(rank=3, components=6), Flora(rank=3, factors="svd")]
every_shared = pytest.mark.parametrize("spec", SHARED, ids=lambda spec: spec.kind)


def at(spec: AdapterSpec, backbone: Backbone, *roles: str) -> Architecture:
    return Architecture.of({site.name: [spec] for site in backbone.sites if site.role in roles})


# What is shared


@every_shared
def test_a_shared_factor_is_one_tensor_that_counts_and_is_stored_once(spec: AdapterSpec) -> None:
    """Llama's queries have 24 outputs, its keys and values 12: keys and values differ in their role alone."""
    model, backbone = tiny("llama-causal")
    architecture = at(spec, backbone, "attn.q", "attn.k", "attn.v")
    with Attachment(model, backbone, [architecture], [1]) as attachment:
        shared: dict[str, dict[int, set[str]]] = {}  # by name, the tensors and the roles of the sites that read each
        count = 0
        for bank in attachment.banks:
            if bank.site.role == "head":
                continue
            for name, parameter in spec.parameters(bank.site).items():
                if parameter.scope == "site":
                    count += parameter.count if parameter.trainable else 0
                    continue
                value = bank.values[name]
                shared.setdefault(name, {}).setdefault(value.data_ptr(), set()).add(bank.site.role)
                assert bank.slots()[name].data_ptr() == value.data_ptr(), "read without a copy"
        of_model = isinstance(spec, Randlora | Vblora)
        assert shared
        for tensors in shared.values():
            assert sorted(map(len, tensors.values())) == ([3] if of_model else [1, 1, 1])
        once = {bank.values[name].data_ptr(): bank.values[name] for bank in attachment.banks for name in bank.rows}
        trained = sum(value.numel() for value in once.values() if value.requires_grad)
        assert architecture.num_params(backbone) == count + trained == attachment.num_adapter_params()
        state = {name: value for name, value in attachment.state().items() if name.startswith("shared.")}
        assert sum(value.numel() for value in state.values()) == trained, "frozen ones follow from their key"
        written = sum(v.nbytes for name, v in attachment.state().items() if not name.startswith("head."))
        assert written == architecture.stored_bytes(backbone)


def test_counts_by_hand() -> None:
    backbone = tiny("bert")[1]  # two layers of 24 features
    layers = backbone.num_layers

    def count(spec: AdapterSpec) -> int:
        return at(spec, backbone, "attn.q").num_params(backbone)

    assert count(Randlora(rank=5)) == layers * (5 * 5 + 5 * 24), "five terms of rank 5 span 24 features"
    assert count(Vblora(rank=2, vectors=9, vector_length=4)) == layers * 9 * 2 * (6 + 6) + 9 * 4
    assert count(Mos(rank=7, pool=5, private_rank=2)) == layers * 2 * 48 + 5 * 48
    assert count(Lily(rank=3, expansions=2)) == layers * (3 * 24 + 2 * 3) + 2 * 24 * 3
    assert count(Eigenlorax(rank=3, components=6)) == layers * 2 * 3 * 6
    assert count(Flora(rank=3, factors="svd")) == layers * 9


@pytest.mark.parametrize("spec", FROZEN, ids=lambda spec: spec.kind)
def test_training_moves_all_but_frozen_factors_and_places(spec: AdapterSpec) -> None:
    model, backbone = tiny("bert")
    with Attachment(model, backbone, [at(spec, backbone, "attn.q", "attn.v")], [1]) as attachment:
        banks = [bank for bank in attachment.banks if bank.site.role != "head"]
        before = [{name: value.clone() for name, value in bank.of_slot(0).items()} for bank in banks]
        optimizer = PackedAdamW(attachment, [Training(learning_rate=0.1, weight_decay=0.1)])
        for number in range(1, 5):
            model(tokens()).logits.square().mean().backward()
            optimizer.step(number, torch.tensor([0.1]))
        for bank, old in zip(banks, before, strict=True):
            for name, value in bank.of_slot(0).items():
                moves = spec.parameters(bank.site)[name].trainable
                assert torch.equal(value, old[name]) != moves, f"{bank.site.name} {name}"


# What they compute


def test_randlora_sums_scaled_random_matrices_to_full_rank() -> None:
    spec = Randlora(rank=4, alpha=8.0)
    change, v = change_of(spec)
    terms = spec.terms(SITE)
    assert (IN, OUT, terms) == (24, 16, 4)
    wide = torch.cat([v["B"][:IN, j] for j in range(terms)], 1)  # [24, 16], term after term
    narrow = torch.stack([v["L"][r, j] * v["A"][r, :OUT] * v["G"][j] for r in range(4) for j in range(terms)])
    close(change, 2.0 * (wide @ narrow).T)
    assert int(torch.linalg.matrix_rank(change)) == OUT


def test_vblora_adds_the_chosen_vectors_up() -> None:
    spec = Vblora(rank=2, vectors=7, vector_length=4, top_k=3)
    change, v = change_of(spec)

    def vector(logits: Tensor) -> Tensor:
        best = sorted(range(7), key=lambda i: -logits[i].item())[:3]
        weights = torch.stack([logits[i].exp() for i in best])
        return sum((w * v["V"][i] for w, i in zip(weights / weights.sum(), best, strict=True)), torch.zeros(4))

    a = torch.stack([torch.cat([vector(v["a"][r, n]) for n in range(IN // 4)]) for r in range(2)])
    b = torch.stack([torch.cat([vector(v["b"][n, r]) for n in range(OUT // 4)]) for r in range(2)], 1)
    close(change, b @ a)
    # 24 and 16 have the common divisors 1, 2, 4 and 8
    assert [Vblora(vector_length=n).length(SITE) for n in (256, 8, 7, 1)] == [8, 8, 4, 1]


def test_mos_puts_shards_together() -> None:
    spec = Mos(rank=3, pool=2, shards=4, private_rank=2, scale=0.5)
    change, v = change_of(spec)

    def row(name: str, r: int) -> Tensor:
        shards = v[name].reshape(8, -1)
        return torch.cat([shards[int(place)] for place in v[f"{name}_places"][r]])

    terms = [torch.outer(row("B", r), row("A", r)) for r in range(3)]
    terms += [torch.outer(v["B_private"][r], v["A_private"][r]) for r in range(2)]
    close(change, 0.5 * sum(terms, torch.zeros(OUT, IN)))


def test_places_of_mos_are_random_of_the_site_and_of_the_factor() -> None:
    model, backbone = tiny("bert")
    spec = Mos(rank=5, pool=3, shards=4)
    with Attachment(model, backbone, [at(spec, backbone, "attn.q")], [1]) as attachment:
        found = [bank.of_slot(0) for bank in attachment.banks if bank.site.role == "attn.q"]
        places = [values[f"{name}_places"].flatten() for values in found for name in "AB"]
    for own in places:
        assert own.dtype == torch.int32
        assert sorted(own[:12].tolist()) == list(range(12)), "no shard again before all have occurred"
        assert len(set(own[12:].tolist())) == 8
    assert all(not torch.equal(one, other) for i, one in enumerate(places) for other in places[:i])


def test_gates_of_lily_are_of_the_token() -> None:
    torch.manual_seed(0)
    spec = Lily(rank=3, expansions=2, scale=2.0)
    bank = Bank(SITE, [spec], nn.Linear(IN, OUT), [0]).eval()
    with torch.no_grad():
        bank.values["B"].normal_()
        x, y = torch.randn(1, 4, IN), torch.randn(1, 4, OUT)
        v = bank.of_slot(0)
        for t in range(4):
            inner = v["A"] @ x[0, t]
            gates = (v["G"] @ inner).softmax(0)
            expected = y[0, t] + 2.0 * sum(gates[e] * v["B"][e] @ inner for e in range(2))
            torch.testing.assert_close(bank(x, y)[0, t], expected, atol=1e-5, rtol=1e-5)


def test_flora_of_the_weight_has_its_leading_part() -> None:
    base = nn.Linear(IN, OUT)
    spec = Flora(rank=3, factors="svd")
    v = Bank(SITE, [spec], base, [0]).of_slot(0)
    u, s, w = torch.linalg.svd(base.weight.detach())
    torch.testing.assert_close(v["B"] @ v["A"], u[:, :3] @ torch.diag(s[:3]) @ w[:3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(v["A"] @ v["A"].T, torch.eye(3), atol=1e-5, rtol=1e-5)
    assert not v["G"].any()
    assert spec.fits(SITE) is not Flora(rank=OUT + 1, factors="svd").fits(SITE)


@pytest.mark.parametrize("spec", [s for s in FROZEN if isinstance(s, LowRank)], ids=lambda spec: spec.kind)
def test_a_low_rank_update_is_the_lora_of_its_factors(spec: LowRank) -> None:
    weight, _, base, values = weight_and_bias(spec)
    a, b = spec.matrices_of_one(values)
    assert a.shape == (spec.total_rank, IN)
    assert b.shape == (OUT, spec.total_rank)
    close(weight, base.weight.detach() + b @ a)


# The same in Hugging Face's peft


def beside_peft(
    spec: AdapterSpec, config: Callable[[Any, Sequence[Site]], Any], fill: Callable[..., None], ids: Tensor
) -> tuple[dict[str, Tensor], nn.Module]:
    """Assert the trainable count and the logits of peft; return our gradients, and peft's model with its own."""
    from peft import get_peft_model

    model, backbone = tiny("llama-causal")
    architecture = at(spec, backbone, "attn.q", "attn.o", "mlp.down")
    sites = [backbone.site(name) for name, _ in architecture]
    theirs = get_peft_model(copy.deepcopy(model), config(spec, sites)).eval()  # type: ignore[arg-type]
    trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trainable == architecture.num_params(backbone)
    with Attachment(model, backbone, [architecture], [1]) as attachment:
        attachment.load_state(noisy(attachment))
        whole = {(key.scope, key.name): pool.value.detach()[0] for key, pool in attachment.pools.items()}
        with torch.no_grad():
            for bank in attachment.banks:
                if bank.site.role != "head":
                    values = {**bank.of_slot(0), **{name: v for (scope, name), v in whole.items() if scope == "model"}}
                    fill(theirs.get_submodule(f"base_model.model.{bank.site.module}"), values, spec)
        attachment.eval()
        ours, others = model(ids).logits, theirs(input_ids=ids).logits
        torch.testing.assert_close(ours, others, atol=1e-5, rtol=1e-5)
        ours.square().mean().backward()
        others.square().mean().backward()
        found = {key.name: pool.value.grad[0] for key, pool in attachment.pools.items() if pool.value.grad is not None}
        for bank in attachment.banks:
            if bank.site.name == "layers.0.attn.o":
                found |= {n: v.grad[0] for n, v in bank.values.items() if v.grad is not None and n not in bank.rows}
    return found, theirs


def test_randlora_is_that_of_peft() -> None:
    from peft import RandLoraConfig

    def config(spec: Any, sites: Sequence[Site]) -> Any:
        return RandLoraConfig(r=spec.rank, randlora_alpha=16, target_modules=[site.module for site in sites])

    fill = PEFT_TYPES["randlora"].fill
    found, theirs = beside_peft(Randlora(rank=5, alpha=16.0), config, fill, tokens())
    layer = theirs.get_submodule("base_model.model.model.layers.0.self_attn.o_proj")
    torch.testing.assert_close(found["L"], layer.randlora_lambda["default"].grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["G"], layer.randlora_gamma["default"].grad, atol=1e-5, rtol=1e-4)


def test_vblora_is_that_of_peft() -> None:
    from peft import VBLoRAConfig

    def config(spec: Any, sites: Sequence[Site]) -> Any:
        modules = [site.module for site in sites]
        return VBLoRAConfig(r=spec.rank, num_vectors=9, vector_length=4, topk=spec.top_k, target_modules=modules)

    fill = PEFT_TYPES["vblora"].fill
    found, theirs = beside_peft(Vblora(rank=2, vectors=9, vector_length=4), config, fill, tokens())
    layer = theirs.get_submodule("base_model.model.model.layers.0.self_attn.o_proj")
    torch.testing.assert_close(found["V"], layer.vblora_vector_bank["default"].grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["a"], layer.vblora_logits_A["default"].grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["b"], layer.vblora_logits_B["default"].grad, atol=1e-5, rtol=1e-4)


def test_lily_is_that_of_peft_for_one_token() -> None:
    from peft import LilyConfig

    def config(spec: Any, sites: Sequence[Site]) -> Any:
        suffixes = sorted({site.module.rpartition(".")[2] for site in sites})
        return LilyConfig(r=spec.rank, num_B=spec.expansions, scaling=spec.scale, target_modules=suffixes)

    def fill(module: Any, values: dict[str, Tensor], spec: Any) -> None:
        module.lily_A["default"].weight.copy_(values["A"])
        module.lily_router["default"].weight.copy_(values["G"])
        module.lily_B["default"].weight.copy_(values["B"].mT.flatten(0, 1))

    found, theirs = beside_peft(Lily(rank=3, expansions=2, scale=2.0), config, fill, tokens(1, 1))
    layer = theirs.get_submodule("base_model.model.model.layers.0.self_attn.o_proj")
    torch.testing.assert_close(found["A"], layer.lily_A["default"].weight.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["G"], layer.lily_router["default"].weight.grad, atol=1e-5, rtol=1e-4)


# Supernets


def test_subnets_are_parts_of_what_a_supernet_shares() -> None:
    model, backbone = tiny("bert")
    sizes = Choice.of([0, 1, 3])
    space = SearchSpace(
        backbone=backbone,
        adapters={
            "vblora": AdapterChoice(kind="vblora", fields={"rank": sizes, "vectors": 9, "vector_length": 4}),
            "mos": AdapterChoice(kind="mos", fields={"rank": sizes, "pool": Choice.of([3, 5])}),
            "lily": AdapterChoice(kind="lily", fields={"rank": sizes, "expansions": Choice.of([2, 3])}),
            "eigenlorax": AdapterChoice(kind="eigenlorax", fields={"rank": sizes, "components": 4}),
            "flora": AdapterChoice(kind="flora", fields={"rank": sizes, "factors": "svd"}),
            "randlora": AdapterChoice(kind="randlora", placement="layer", fields={"rank": Choice.of([4, 8])}),
        },
    )
    weights = SharedWeights(model, space, seed=0)
    with torch.no_grad():
        for value, _ in weights.trainable():
            value.add_(0.1 * torch.randn_like(value))
    for seed in range(3):
        found = [space.decode(space.sample(Random(10 * seed + k))).architecture for k in range(2)]
        with Attachment(model, backbone, found, [0, 0], shared=weights, bank_of_slot=[0, 0]) as attachment:
            attachment.eval()
            packed = model(tokens().repeat(2, 1)).logits.unflatten(0, (2, -1))
            values = [
                {
                    (bank.site.name, bank.specs[0].structure()): bank.of_slot(bank.slots_served.index(k))
                    for bank in attachment.banks
                    if k in bank.slots_served
                }
                for k in range(2)
            ]
        for k, architecture in enumerate(found):
            with Attachment(model, backbone, [architecture], [5]) as attachment:
                for bank in attachment.banks:
                    bank.load_slot(0, values[k][bank.site.name, bank.specs[0].structure()])
                attachment.eval()
                torch.testing.assert_close(model(tokens()).logits, packed[k], atol=1e-5, rtol=1e-5)


# Pretrained LoRAs


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Folders of two LoRAs of rank 2 of the tiny BERT, at its queries alone."""
    folder = tmp_path_factory.mktemp("given")
    for seed in (1, 2):
        lora_in(folder / str(seed), tiny("bert")[0], seed, ["query"], r=2, lora_alpha=6)
    return tuple(str(folder / str(seed)) for seed in (1, 2))


def test_the_basis_of_eigenlorax_spans_the_given_loras(given: tuple[str, ...]) -> None:
    from safetensors.torch import load_file

    model, backbone = tiny("bert")
    spec = Eigenlorax(rank=4, components=6, given=given)
    with Attachment(model, backbone, [at(spec, backbone, "attn.q")], [1]) as attachment:
        bank = next(bank for bank in attachment.banks if bank.site.layer == 1)
        v = bank.of_slot(0)
    u, w = v["U"], v["V"].T
    for rows in (u, w):
        torch.testing.assert_close(rows @ rows.T, torch.eye(6), atol=1e-5, rtol=0)
    files = [load_file(Path(folder) / "adapter_model.safetensors") for folder in given]
    name = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_{}.weight"
    a = torch.cat([file[name.format("A")] for file in files])
    b = torch.cat([3.0 * file[name.format("B")].T for file in files])
    for stack, rows in ((a, u), (b, w)):
        torch.testing.assert_close(stack @ rows[:4].T @ rows[:4], stack, atol=1e-5, rtol=1e-5)
        variances = (stack @ rows.T).square().sum(0)
        assert variances[:4].tolist() == sorted(variances[:4].tolist(), reverse=True), "the leading direction first"
        assert float(variances[4:].max()) < 1e-8, "the random ones are orthogonal to all of them"
    # The coefficients of a given LoRA reproduce it.
    d, c = a[:2] @ u.T, w @ (b[:2]).T
    torch.testing.assert_close(w.T @ c @ d @ u, b[:2].T @ a[:2], atol=1e-4, rtol=1e-4)


def test_fewer_components_are_the_leading_ones(given: tuple[str, ...]) -> None:
    model, backbone = tiny("bert")
    site = backbone.site("layers.0.attn.q")
    base = model.get_submodule(site.module)
    few, many = (Bank(site, [Eigenlorax(components=n, given=given)], base, [1]).of_slot(0) for n in (2, 5))
    torch.testing.assert_close(few["U"], many["U"][:2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(few["V"], many["V"][:, :2], atol=1e-5, rtol=1e-5)
    spec = Eigenlorax(given=given)
    assert spec_from_dict(spec.to_dict() | {"given": list(given)}) == spec


# Studies


def study(folder: Path, adapters: dict[str, Any]) -> Path:
    from transformers import AutoModelForSequenceClassification

    path = save_study(
        folder,
        space={"adapters": adapters, "one_of": {"type": {"members": list(adapters)}}},
        baselines={"names": ["head"], "learning_rates": [1e-2]},
        search={"searcher": "random", "trials": 12, "batch": 12},
    )
    for seed in (1, 2):
        model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=len(LABELS))
        lora_in(folder / str(seed), model, seed, ["query", "value"], r=2)
    return path


def test_a_study_of_these_types_runs_from_its_file(tmp_path: Path) -> None:
    path = study(
        tmp_path / "study",
        {
            "randlora": {"rank": [4, 8], "alpha": 16},
            "vblora": {"rank": [1, 2], "vectors": 8, "vector_length": 4},
            "mos": {"rank": [2, 4], "pool": [4, 6]},
            "lily": {"rank": [2, 4]},
            "eigenlorax": {"rank": [2, 4], "components": [3, 6], "given": ["1", "2"]},
            "flora": {"rank": [2, 4], "factors": "svd"},
        },
    )
    snapshot = run(load_study(path))
    assert all(trial.state == "complete" for trial in snapshot.search_trials)
    kinds = {kind for trial in snapshot.search_trials for kind in trial.candidate.architecture.kinds}
    assert len(kinds) >= 5, kinds
    for trial in snapshot.search_trials:
        for site, spec in trial.candidate.architecture:
            if spec.kind == "eigenlorax":
                assert [Path(folder).name for folder in spec.given] == ["1", "2"]  # type: ignore[attr-defined]
                assert snapshot.backbone.site(site).role in ("attn.q", "attn.v")


def test_what_cannot_be_declared(tmp_path: Path) -> None:
    path = study(
        tmp_path / "study",
        {
            "eigenlorax": {"given": ["1", "nowhere"]},
            "vblora": {"given": ["1"]},
            "without": {"kind": "eigenlorax"},
        },
    )
    with pytest.raises(StudyFileError) as error:
        run(load_study(path))
    for part in ("nowhere/adapter_config.json: no such file", "not vblora", "eigenlorax is made of"):
        assert part in str(error.value)


def test_a_core_in_the_weight_takes_the_ranks_that_it_has() -> None:
    fields = {"rank": Choice.of([2, 40]), "factors": Choice.of(["frozen", "svd"])}
    with pytest.raises(SpaceError, match=r"f.rank: 40 is too large for layers.0.attn.q"):
        SearchSpace(backbone=tiny("bert")[1], adapters={"f": AdapterChoice(kind="flora", fields=fields)})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Vblora(vectors=3, top_k=4), r"top_k must be at most vectors \(3\), got 4"),
        (lambda: Mos(private_rank=0), "private_rank must be at least 1"),
        (lambda: Mos(shards=0), "shards must be at least 1"),
        (lambda: Randlora(rank=0), "rank must be at least 1"),
        (lambda: Randlora(alpha=0.0), "alpha must be greater than 0"),
        (lambda: Lily(expansions=0), "expansions must be at least 1"),
        (lambda: Eigenlorax(components=0), "components must be at least 1"),
        (lambda: Flora(factors="half"), "factors must be one of trained, frozen, svd"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], AdapterSpec], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()
