"""Checkpointing and micro-batches: the losses, gradients and random streams of a step are those of a plain step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.checkpointing import saving_memory
from autopeft.evaluators.attachment.layers import layer_paths, without_cache
from autopeft.evaluators.backbones import LoadedBackbone
from autopeft.evaluators.costs import measurement, pack_plans, pack_sizing
from autopeft.evaluators.costs.pack_plans import divisible
from autopeft.evaluators.costs.pack_sizing import Levers
from autopeft.evaluators.costs.step_memory import saved_bytes
from autopeft.evaluators.training.activations import ActivationCache
from autopeft.evaluators.training.base import EvaluatorOptions, TrainingEvaluator
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.adapters import Bottleneck, Dora, Full, Lora, Mixture, Prefix, Vera
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.introspection import describe
from autopeft.search_space.metrics import ALWAYS

from ...search_space.adapters.test_given import lora_in, mixture_of, placed
from ...support import conformance
from ...support.families import FAMILIES
from ...support.slow import slow
from ...support.tiny_models import seeded
from .test_packed import SPLITS, alone, at, compare, loaded, mixed, requests, together  # noqa: F401

torch.set_num_threads(1)

#: Rows of a minibatch, of different lengths.
ROWS = tuple(range(8))
CHECKPOINTED, HALVES, THIRDS = Levers(checkpointing=True), Levers(4), Levers(3, checkpointing=True)


def step(
    evaluator: PackedEvaluator, architectures: Sequence[Architecture], levers: Levers, steps: int = 2
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Losses [steps, K], summed gradients by name, and the states of the random streams after the steps."""
    seeds = list(range(len(architectures)))
    with (
        Attachment(evaluator.model, evaluator.backbone, architectures, seeds) as attachment,
        saving_memory(attachment, levers.checkpointing),
    ):
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for value, _ in attachment.trainable():  # away from the zeros of the start
                value.add_(0.05 * torch.randn(value.shape, generator=generator))
        losses = [evaluator.step_gradients(attachment, ROWS, levers.rows) for _ in range(steps)]
        assert not attachment.taps, "no input outlives the step"
        assert not any(state.last for _, state, _ in attachment.routers.served), "no graph outlives the step"
        names = {
            value: f"{i} {bank.site.name} {n}"
            for i, bank in enumerate(attachment.banks)
            for n, value, _ in bank.trained()
        }
        found = {
            names.get(v, f"shared {tuple(v.shape)}"): v.grad.clone()
            for v, _ in attachment.trainable()
            if v.grad is not None
        }
        states = [stream.get_state() for bank in attachment.banks for stream in bank.dropout_streams]
    return torch.stack(losses), found, states


def same(evaluator: PackedEvaluator, architectures: Sequence[Architecture], *levers: Levers) -> None:
    losses, gradients, states = step(evaluator, architectures, Levers())
    assert any(gradient.any() for gradient in gradients.values())
    for each in levers:
        found, own, after = step(evaluator, architectures, each)
        torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6, msg=lambda m, each=each: f"{each}: {m}")
        torch.testing.assert_close(own, gradients, rtol=1e-4, atol=1e-6, msg=lambda m, each=each: f"{each}: {m}")
        assert all(map(torch.equal, after, states)), f"{each}: the streams have gone as far"


@pytest.mark.parametrize("kind", conformance.kinds("full", "mixture"))
def test_levers_change_no_gradient(loaded: LoadedBackbone, kind: str) -> None:  # noqa: F811
    row = next(row for row in conformance.ROWS if row.kind == kind)
    own = [at(loaded, spec, k % 2, row.roles) for k, spec in enumerate(row.specs)]
    if not any(own):
        pytest.skip(f"{loaded.backbone.family} has no site for {kind}")
    same(together(loaded), [*own, at(loaded, Lora(rank=2, dropout=0.3), 0)], CHECKPOINTED, HALVES, THIRDS)


def test_dropout_draws_the_same_masks_in_every_part_and_every_time(loaded: LoadedBackbone) -> None:  # noqa: F811
    specs = [Lora(rank=2, dropout=0.3), Dora(rank=2, dropout=0.2), Vera(rank=4, dropout=0.2), Prefix(length=3)]
    own = [at(loaded, spec, k % 2) for k, spec in enumerate(specs)]
    own.append(at(loaded, Bottleneck(size=4, form="parallel", dropout=0.4), 1))
    same(together(loaded), own, CHECKPOINTED, HALVES, THIRDS, Levers(1))


@pytest.mark.parametrize("cached", [True, False])
def test_shared_lower_layers_serve_parts_too(loaded: LoadedBackbone, cached: bool) -> None:  # noqa: F811
    evaluator = together(loaded, cache=ActivationCache(10**7) if cached else None)
    assert evaluator.lower_layers is not None
    same(evaluator, mixed(loaded), CHECKPOINTED, HALVES, THIRDS)


def test_routers_count_their_penalties_once(loaded: LoadedBackbone) -> None:  # noqa: F811
    """With noise, dropout, losses of balance, and a follower whose leader sits in another layer."""
    noisy = Mixture(expert=Lora(rank=2, dropout=0.2), experts=4, balance=0.5, z_loss=0.1, router_noise=0.3)
    leader = next(s for s in loaded.backbone.sites if s.role == "attn.q" and s.layer == 1)
    follow = Mixture(expert=Lora(rank=2), experts=4, router="follow", leader=leader.name)
    followers = [s for s in loaded.backbone.sites if s.role == "mlp.up" and s.layer in (1, 3)]
    own = [
        at(loaded, noisy, 1, ("attn.q", "mlp.up")),
        Architecture.of({leader.name: [noisy], **{site.name: [follow] for site in followers}}),
        at(loaded, Mixture(expert=Bottleneck(size=3), experts=3, balance=0.2), 0, ("mlp",)),
        at(loaded, Mixture(expert=Lora(rank=2), experts=3, router="sigmoid"), 0, ("attn.v",)),
    ]
    same(together(loaded), own, CHECKPOINTED)
    assert not any(map(divisible, own))


def test_mixtures_without_penalties_can_be_divided(loaded: LoadedBackbone) -> None:  # noqa: F811
    quiet = Mixture(expert=Lora(rank=2, dropout=0.2), experts=3, balance=0.0)
    own = [at(loaded, quiet, 1), at(loaded, Mixture(expert=Lora(rank=2), experts=2, router="uniform"), 0)]
    assert all(map(divisible, own))
    same(together(loaded), own, CHECKPOINTED, HALVES, THIRDS)


def test_a_first_pass_is_read_again(loaded: LoadedBackbone, tmp_path: Path) -> None:  # noqa: F811
    if not loaded.backbone.causal:
        pytest.skip("one model is enough")
    paths = [tmp_path / name for name in "ab"]
    for seed, path in enumerate(paths):
        lora_in(path, loaded.model, seed, ["q_proj"], r=2)
    same(together(loaded), [placed(loaded.backbone, mixture_of(paths, router="xlora").canonical(), ("attn.q",))],
         CHECKPOINTED, HALVES)  # fmt: skip


@pytest.mark.parametrize(
    "levers", [slow({"checkpointing": True}), slow({"micro_batch": 3}), {"micro_batch": 3, "checkpointing": True}]
)
def test_a_study_with_levers_is_the_study_without(loaded: LoadedBackbone, levers: dict[str, Any]) -> None:  # noqa: F811
    """All of a training: steps, scores in small batches, weights, and the backbone itself trained with its dropout."""
    wanted = requests([*mixed(loaded)[:3], Architecture.of({"backbone": [Full()]})], test=True)
    found = together(loaded, pack=3, **levers).evaluate(wanted)
    compare(found, alone(loaded).evaluate(wanted))
    own = TrainEvaluator(
        loaded, "classification", SPLITS, 16, levers=Levers(levers.get("micro_batch"), "checkpointing" in levers)
    )
    compare(own.evaluate(wanted[:1]), found[:1])


def test_a_checkpointed_layer_keeps_its_input_alone(loaded: LoadedBackbone) -> None:  # noqa: F811
    """Counted by the tensors that a real step saves, with the hooks of torch's autograd, and by the forecast."""
    evaluator = together(loaded)
    (wanted,) = requests([at(loaded, Lora(rank=2), 0, ("attn.q", "mlp.up"))])
    batch = evaluator.longest_batch(wanted.candidate)
    with evaluator.attach(wanted) as attachment:
        plain, again = (
            pack_sizing.step_bytes(attachment, evaluator.task, batch, checkpointing) for checkpointing in (False, True)
        )
        held = pack_sizing.trained_bytes(attachment)
        layer = loaded.model.get_submodule(layer_paths(loaded.backbone)[0])
        forward = layer.forward
        assert "forward" not in vars(layer), "the measurement leaves no trace"
        # Without checkpointing the layers keep equal parts; with it, one layer does and the others their inputs.
        inputs = len(batch["targets"]) * max(evaluator.lengths["train"]) * 24 * 4
        assert again - held < (plain - held) / 4 + 5 * inputs
        assert again < plain
        with saving_memory(attachment, True):
            assert layer.forward != forward
        assert layer.forward == forward


def test_a_step_that_does_not_fit_uses_the_levers_in_their_order(
    loaded: LoadedBackbone,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pack_plans, "ENOUGH_TOKENS", {"cpu": 32})
    (wanted,) = requests([at(loaded, Lora(rank=2), 0)])
    evaluator = together(loaded)
    order = evaluator.plans.order([wanted])
    longest = max(evaluator.lengths["train"])
    cheap = [n for n in (4, 2, 1) if n * longest >= 32]
    assert order == [Levers(), *map(Levers, cheap), *(Levers(n, True) for n in (None, 4, 2, 1))]
    forecast = pack_sizing.forecasts(evaluator, wanted, lambda _: True)
    needed = [forecast(levers) for levers in order]
    for levers, of_slot in zip(order, needed, strict=True):
        enough = of_slot / pack_sizing.FILLED + 1
        found = pack_sizing.plan(forecast, order, enough, 8)
        first = next(each for each, size in zip(order, needed, strict=True) if size <= of_slot)
        assert (found.levers, found.slots >= 1) == (first, True), levers
    assert pack_sizing.plan(forecast, order, 1, 8).levers == order[-1], "the least that can be done"


def test_a_forecast_counts_frozen_tensors(loaded: LoadedBackbone) -> None:  # noqa: F811
    """The initial values that an init with an offset keeps beside the trained ones."""
    evaluator = together(loaded)

    def forecast(spec: Lora) -> int:
        (wanted,) = requests([at(loaded, spec, 0)])
        with evaluator.attach(wanted) as attachment:
            beside = pack_sizing.step_bytes(attachment, evaluator.task, evaluator.longest_batch(wanted.candidate))
        return pack_sizing.forecasts(evaluator, wanted, lambda _: True)(Levers()) - beside

    plain, offset = Lora(rank=4), Lora(rank=4, init="pissa")
    architecture = at(loaded, plain, 0)
    assert forecast(offset) - forecast(plain) == 4 * architecture.num_params(loaded.backbone)


@pytest.mark.slow
def test_the_note_says_what_is_done_and_in_which_order(
    loaded: LoadedBackbone,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (wanted,) = requests([at(loaded, Lora(rank=2), 0)])
    evaluator = together(loaded)
    assert evaluator.notes_on(wanted.candidate) == evaluator.notes
    monkeypatch.setattr(pack_sizing, "free_bytes", lambda device: 10_000)
    evaluator = together(loaded)
    *_, note = evaluator.notes_on(wanted.candidate)
    assert "micro-batches of 1 and checkpointed layers, 1 at a time, with the same results" in note
    assert "fewer candidates at a time" in note
    assert note.index("fewer candidates") < note.index("whole minibatches and checkpointed layers")
    compare(evaluator.evaluate([wanted]), alone(loaded).evaluate([wanted]))
    for settings in ({"checkpointing": False}, {"micro_batch": 8, "checkpointing": True}):
        given = together(loaded, **settings)
        assert given.plans.order([wanted])[-1].checkpointing == settings["checkpointing"]


def test_a_lack_of_memory_in_the_training_tries_the_levers(
    loaded: LoadedBackbone,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried: list[tuple[int, Levers]] = []
    train = PackedEvaluator._train_slots

    def scarce(self: PackedEvaluator, pack: Sequence[Any], levers: Levers, *rest: Any) -> Any:
        tried.append((len(pack), levers))
        if not levers.checkpointing:
            raise torch.OutOfMemoryError("no room")
        return train(self, pack, levers, *rest)

    monkeypatch.setattr(PackedEvaluator, "_train_slots", scarce)
    wanted = requests(mixed(loaded)[:2])
    evaluator = together(loaded, pack=2)
    order = evaluator.plans.order(wanted)
    compare(evaluator.evaluate(wanted), alone(loaded).evaluate(wanted))
    tries = order[: order.index(CHECKPOINTED) + 1]
    assert tried[0] == (2, Levers())
    assert [levers for slots, levers in tried if slots == 1][: len(tries)] == tries
    assert "out of memory: no room: going on with whole minibatches and checkpointed layers" in caplog.text


def test_what_cannot_be_divided_does_not_keep_others_whole(
    loaded: LoadedBackbone,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also after a lack of memory: the levers of a candidate alone are those of its kind."""
    tried: list[tuple[tuple[str, ...], Levers]] = []
    train = PackedEvaluator._train_slots

    def scarce(self: PackedEvaluator, pack: Sequence[Any], levers: Levers, *rest: Any) -> Any:
        tried.extend((run.request.candidate.architecture.kinds, levers) for run in pack)
        if not (levers.rows or levers.checkpointing):
            raise torch.OutOfMemoryError("no room")
        return train(self, pack, levers, *rest)

    monkeypatch.setattr(PackedEvaluator, "_train_slots", scarce)
    mixture = Mixture(expert=Lora(rank=2), experts=3, balance=0.5)
    one, other = requests([at(loaded, Lora(rank=2), 1), at(loaded, mixture, 1)])
    wanted = [one, replace(other, candidate=replace(other.candidate, training=one.candidate.training))]
    found = together(loaded, pack=2, micro_batch=4).evaluate(wanted)
    compare(found, alone(loaded).evaluate(wanted), tolerance=1e-4)
    assert tried == [(("lora",), HALVES), (("mixture",), Levers()), (("mixture",), CHECKPOINTED)]


@pytest.mark.parametrize("evaluator", [PackedEvaluator, TrainEvaluator])
def test_dropout_of_positions_is_not_divided(evaluator: type[TrainingEvaluator]) -> None:
    """DeBERTa's query runs on the relative positions too, which are no rows of a minibatch."""
    (family,) = (each for each in FAMILIES if each.name == "DebertaV2")
    deberta = family.loaded()
    (wanted,) = requests([at(deberta, Lora(rank=2, dropout=0.3), 1, ("attn.q",))])
    whole, parts = (
        evaluator.of(deberta, "classification", SPLITS, 16, ALWAYS, EvaluatorOptions(micro_batch=n)).evaluate([wanted])
        for n in (None, 3)
    )
    compare(parts, whole)


def test_the_pace_is_that_of_a_step_that_fits(
    loaded: LoadedBackbone,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measurement, "MAX_REPEATS", 2)
    (wanted,) = requests([at(loaded, Lora(rank=2), 0)])
    assert together(loaded).pace(wanted.candidate, within_s=60.0).share == 1.0
    monkeypatch.setattr(pack_sizing, "free_bytes", lambda device: 10_000)
    evaluator = together(loaded)
    assert evaluator.levers_of(wanted.candidate) == Levers(1, True)
    assert evaluator.pace(wanted.candidate, within_s=60.0).share == 1 / 8
    (full,) = requests([Architecture.of({"backbone": [Full()]})])
    assert evaluator.levers_of(full.candidate) == Levers(), "it shares no backbone, so no pack plans it"


def test_adapters_keep_the_activations_of_a_bf16_backbone_in_its_type() -> None:
    """LoRAs compute in float32, yet what they keep of their inputs is the backbone's own tensors of 2 bytes."""
    width, inner, layers, tokens, rank = 64, 96, 2, 40, 4
    config = LlamaConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=inner,
                         vocab_size=40)  # fmt: skip
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    backbone = describe(model, id="bf16")
    ids = torch.arange(tokens).view(1, -1)

    def kept(roles: Sequence[str]) -> int:
        sites = [site for site in backbone.sites if site.role in roles]
        own = Architecture.of({site.name: [Lora(rank=rank)] for site in sites})
        with Attachment(model, backbone, [own], [0]) as attachment:
            assert {value.dtype for value, _ in attachment.trainable()} == {torch.float32}
            return saved_bytes(attachment, lambda: model.model(input_ids=ids).last_hidden_state.float().sum())

    # Beside a LoRA at the query: the inputs of o, of the mlp and of down, and rank numbers in float32 at each.
    added = kept(("attn.q", "attn.o", "mlp.up", "mlp.down")) - kept(("attn.q",))
    assert added <= layers * tokens * (2 * (width + width + inner) + 3 * 4 * rank) + 3 * layers * 4 * rank


def test_a_decoder_keeps_no_keys_and_values_while_it_trains() -> None:
    model = seeded(LlamaForCausalLM, LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                                 intermediate_size=16, vocab_size=40))  # fmt: skip
    ids = torch.arange(12).view(2, 6)
    with_cache = model.model(input_ids=ids)
    assert with_cache.past_key_values is not None
    with without_cache(model):
        without = model.model(input_ids=ids)
        assert without.past_key_values is None
    assert model.config.use_cache
    assert torch.equal(without.last_hidden_state, with_cache.last_hidden_state)
