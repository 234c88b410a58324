"""Packed evaluation: a candidate in a pack is the candidate alone, whatever happens to the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.attachment.layers import layer_paths
from autopeft.evaluators.backbones import LoadedBackbone, load_backbone
from autopeft.evaluators.base import Outcome, Request
from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.training import packed
from autopeft.evaluators.training.activations import ActivationCache, fingerprint
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.slot_state import SlotState
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.adapters import AdapterSpec, Bottleneck, Full, Lora, Prefix
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.problem import Fidelity
from autopeft.searchers.halving import survivors

from ...support import conformance
from ...support.slow import QUICK_FAMILY, mostly_slow, slow
from ...support.tiny_models import save, seeded, word_tokenizer
from .test_train import LABELS, rows

torch.set_num_threads(1)

SPLITS = Splits(rows("train", 80), rows("validation", 50), rows("test", 20), LABELS)
LAYERS = 4
SHAPE = {"hidden_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 40}
MODELS: dict[str, Any] = {
    "bert": lambda: seeded(BertForSequenceClassification, BertConfig(**SHAPE, vocab_size=40, num_labels=3)),
    "llama": lambda: seeded(
        LlamaForSequenceClassification, LlamaConfig(**SHAPE, vocab_size=40, num_labels=3, pad_token_id=0)
    ),
}
#: 20 steps of 8 rows, with all that a slot has of its own.
TRAININGS: tuple[dict[str, Any], ...] = (
    {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.3, "schedule": "cosine"},
    {"learning_rate": 3e-3, "warmup": 0.2},
    {"learning_rate": 2e-2, "weight_decay": 0.01, "schedule": "constant", "max_grad_norm": 0.0},
    {"learning_rate": 5e-3, "weight_decay": 0.3, "max_grad_norm": 0.1},
)


@pytest.fixture(scope="module", params=mostly_slow(MODELS, QUICK_FAMILY))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedBackbone:
    folder = save(MODELS[request.param](), tmp_path_factory.mktemp(request.param), word_tokenizer())
    return replace(load_backbone(folder, task="classification", labels=LABELS), pretrained_head=False)


def alone(loaded: LoadedBackbone) -> TrainEvaluator:
    return TrainEvaluator(loaded, "classification", SPLITS, max_length=16)


def together(loaded: LoadedBackbone, mixes_depths: bool = True, **settings: Any) -> PackedEvaluator:
    """Packs as they are on a GPU, candidates of all depths side by side, unless `mixes_depths` says otherwise."""
    evaluator = PackedEvaluator(loaded, "classification", SPLITS, max_length=16, **settings)
    evaluator.mixes_depths = mixes_depths
    return evaluator


def at(loaded: LoadedBackbone, spec: AdapterSpec, lowest: int, roles: Sequence[str] = ()) -> Architecture:
    """`spec` in the layers from `lowest` on."""
    wanted = roles or spec.default_roles
    sites = [s for s in loaded.backbone.sites if s.role in wanted and s.layer is not None and s.layer >= lowest]
    return Architecture.of({site.name: [spec] for site in sites if spec.fits(site)})


def requests(architectures: Sequence[Architecture], **settings: Any) -> list[Request]:
    found = []
    for k, architecture in enumerate(architectures):
        training = {"epochs": 2, "batch_size": 8, **TRAININGS[k % len(TRAININGS)]}
        found.append(Request(candidate=Candidate(architecture=architecture, training=training), **settings))
    return found


def mixed(loaded: LoadedBackbone, lowest: int = 2) -> list[Architecture]:
    return [
        at(loaded, Lora(rank=3, dropout=0.2), lowest),
        at(loaded, Bottleneck(size=4, init="houlsby", dropout=0.1), lowest + 1),
        at(loaded, Prefix(length=3), lowest),
        at(loaded, Lora(rank=5), lowest, ("mlp.up",)),
    ]


def compare(found: Sequence[Outcome], expected: Sequence[Outcome], tolerance: float = 1e-5) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.measurement is not None, ours.reason
        assert theirs.measurement is not None, theirs.reason
        # Losses are recorded with five decimals.
        assert ours.measurement.losses == pytest.approx(theirs.measurement.losses, rel=tolerance, abs=1.1e-5)
        assert ours.measurement.values["loss"] == pytest.approx(theirs.measurement.values["loss"], rel=tolerance)
        assert ours.measurement.share == theirs.measurement.share


@pytest.mark.parametrize("kind", conformance.kinds("full"))
@pytest.mark.parametrize("share_lower_layers", [True, slow(False)])
def test_a_candidate_in_a_pack_is_the_candidate_alone(
    loaded: LoadedBackbone, kind: str, share_lower_layers: bool
) -> None:
    """20 steps with dropout, own rates, decay, clipping and schedules; sizes, sites and depths differ."""
    row = next(row for row in conformance.ROWS if row.kind == kind)
    own = [at(loaded, spec, k % 3, row.roles) for k, spec in enumerate(row.specs)]
    if not any(own):
        pytest.skip(f"{loaded.backbone.family} has no site for {kind}")
    wanted = requests([*own, at(loaded, Lora(rank=2, dropout=0.3), 0)])
    found = together(loaded, pack=8, share_lower_layers=share_lower_layers).evaluate(wanted)
    assert all(len(o.measurement.losses) == 20 for o in found if o.measurement)
    compare(found, alone(loaded).evaluate(wanted))


def test_every_pack_size_and_cache(loaded: LoadedBackbone, tmp_path: Path) -> None:
    """Packs of 3 and 1 with rungs on the way, from no cache, a small one, memory and disk."""
    wanted = requests(mixed(loaded), fidelity=Fidelity(rungs=(0.3, 0.6)), test=True, keep_weights=True)
    expected = alone(loaded).evaluate(wanted)
    for cache in (None, ActivationCache(1000), ActivationCache(10**7, tmp_path), ActivationCache(10**7, tmp_path)):
        found = together(loaded, pack=3, cache=cache).evaluate(wanted)
        compare(found, expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.measurement
            assert theirs.measurement
            assert ours.weights
            assert theirs.weights
            for (share, values), (own_share, own) in zip(ours.measurement.rungs, theirs.measurement.rungs, strict=True):
                assert (share, values["loss"]) == (own_share, pytest.approx(own["loss"], rel=1e-5))
            assert ours.measurement.test == pytest.approx(theirs.measurement.test, rel=1e-5)
            assert len(ours.measurement.test_per_example["loss"]) == 20
            assert ours.weights.keys() == theirs.weights.keys()
            for name, value in ours.weights.items():
                torch.testing.assert_close(value, theirs.weights[name], rtol=1e-3, atol=1e-5)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3, "one file per split"


def test_depths_are_kept_apart_on_a_cpu(loaded: LoadedBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack runs every layer above the lowest adapter of all its slots: one deep candidate makes all of them pay."""
    packs: list[list[int]] = []
    steps = PackedEvaluator._steps_of

    def watched(self: PackedEvaluator, pack: Sequence[Any], *rest: Any) -> Any:
        packs.append([run.depth for run in pack])
        return steps(self, pack, *rest)

    monkeypatch.setattr(PackedEvaluator, "_steps_of", watched)
    wanted = requests([*mixed(loaded), Architecture()])
    found = together(loaded, mixes_depths=False, pack=8).evaluate(wanted)
    assert packs == [[4], [3], [2, 2, 2]]
    compare(found, alone(loaded).evaluate(wanted))


def test_orders_are_kept_apart(loaded: LoadedBackbone) -> None:
    """Candidates of other seeds, batch sizes and lengths see their own minibatches."""
    base = requests([at(loaded, Lora(rank=2), 1)] * 4)
    wanted = [
        base[0],
        replace(base[1], seed=3),
        replace(base[2], candidate=replace(base[2].candidate, training={**base[2].candidate.training, "epochs": 1})),
        replace(base[3], candidate=replace(base[3].candidate, training={"batch_size": 5, "epochs": 1})),
    ]
    compare(together(loaded, pack=4).evaluate(wanted), alone(loaded).evaluate(wanted))


def test_one_diverges(loaded: LoadedBackbone) -> None:
    wanted = requests(mixed(loaded))
    wild = {**wanted[1].candidate.training, "learning_rate": 1e30, "max_grad_norm": 0.0}
    wanted[1] = replace(wanted[1], candidate=replace(wanted[1].candidate, training=wild))
    found = together(loaded, pack=4).evaluate(wanted)
    assert found[1].failure == "failed"
    assert "the training loss became" in found[1].reason
    others = [0, 2, 3]
    compare([found[k] for k in others], alone(loaded).evaluate([wanted[k] for k in others]))


def test_one_candidate_cannot_be_attached(loaded: LoadedBackbone) -> None:
    wanted = requests([*mixed(loaded), Architecture.of({"layers.0.attn.q": [Bottleneck()]})])
    found = together(loaded).evaluate(wanted)
    assert found[4].failure == "failed"
    assert "cannot be attached" in found[4].reason
    compare(found[:4], alone(loaded).evaluate(wanted[:4]))


def test_out_of_memory_halves_the_pack(loaded: LoadedBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    steps = PackedEvaluator._steps_of

    def scarce(self: PackedEvaluator, pack: Sequence[Any], *rest: Any) -> Any:
        sizes.append(len(pack))
        losses = steps(self, pack, *rest)
        if len(pack) > 2 or any(run.index == 3 for run in pack):
            raise torch.OutOfMemoryError("no room")  # after the steps: nothing of them may stay
        return losses

    monkeypatch.setattr(PackedEvaluator, "_steps_of", scarce)
    wanted = requests([*mixed(loaded), at(loaded, Lora(rank=1), 0)])
    found = together(loaded, pack=5).evaluate(wanted)
    assert (found[3].failure, found[3].reason) == ("infeasible", "out of memory: no room")
    others = [0, 1, 2, 4]
    compare([found[k] for k in others], alone(loaded).evaluate([wanted[k] for k in others]))
    assert sizes[0] == 5
    assert max(sizes[1:]) == 2


def test_the_backbone_itself_is_trained_alone(loaded: LoadedBackbone) -> None:
    wanted = requests([at(loaded, Lora(rank=2), 0), Architecture.of({"backbone": [Full()]})])
    before = fingerprint(loaded.model, loaded.backbone)
    compare(together(loaded, pack=4).evaluate(wanted), alone(loaded).evaluate(wanted))
    assert fingerprint(loaded.model, loaded.backbone) == before


def test_halving(loaded: LoadedBackbone) -> None:
    """Who is left out ends at its rung; who goes on ends as if it had been alone."""
    wanted = requests([*mixed(loaded), *mixed(loaded, 1)], fidelity=Fidelity(rungs=(0.2, 0.5)))
    rungs: list[tuple[float, list[int]]] = []
    ended: list[int] = []

    def select(rung: float, found: Sequence[tuple[int, Any]]) -> list[int]:
        rungs.append((rung, [index for index, _ in found]))
        return [found[place][0] for place in survivors([[values["loss"]] for _, values in found], 0.5)]

    outcomes = together(loaded, pack=3).evaluate(wanted, ended=lambda i, o: ended.append(i), select=select)
    assert [rung for rung, _ in rungs] == [0.2, 0.5]
    assert [len(who) for _, who in rungs] == [8, 4]
    shares = [o.measurement.share for o in outcomes if o.measurement]
    assert sorted(shares) == [0.2] * 4 + [0.5] * 2 + [1.0] * 2
    assert sorted(ended) == list(range(8))
    full = alone(loaded).evaluate(wanted)
    for ours, theirs in zip(outcomes, full, strict=True):
        assert ours.measurement
        assert theirs.measurement
        steps = len(ours.measurement.losses)
        assert steps == math.ceil(20 * ours.measurement.share)
        assert ours.measurement.losses == pytest.approx(theirs.measurement.losses[:steps], rel=1e-5, abs=1.1e-5)
        reached = dict(theirs.measurement.rungs) | {1.0: theirs.measurement.values}
        assert ours.measurement.values["loss"] == pytest.approx(reached[ours.measurement.share]["loss"], rel=1e-5)


def test_halving_needs_one_fidelity(loaded: LoadedBackbone) -> None:
    wanted = requests(mixed(loaded))
    wanted[0] = replace(wanted[0], fidelity=Fidelity(share=0.5))
    with pytest.raises(ValueError, match="the same fidelity"):
        together(loaded).evaluate(wanted, select=lambda rung, found: [])
    with pytest.raises(ValueError, match="cannot select at rungs"):
        alone(loaded).evaluate(wanted, select=lambda rung, found: [])


def test_progress_counts_all_steps(loaded: LoadedBackbone) -> None:
    seen: list[tuple[int, int]] = []
    together(loaded, pack=2).evaluate(requests(mixed(loaded)), lambda *at: seen.append(at))
    assert seen[-1] == (80, 80)
    assert seen == sorted(seen)


def test_the_pack_is_as_large_as_the_memory(loaded: LoadedBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    from autopeft.evaluators.costs import pack_sizing

    evaluator = together(loaded)
    wanted = requests(mixed(loaded))
    with evaluator.attach(wanted[0]) as attachment:
        one = pack_sizing.step_bytes(attachment, evaluator.task, evaluator.longest_batch(wanted[0].candidate))
    assert one > 0
    for free, slots in ((0, 1), (3.5 * one / pack_sizing.FILLED, 3), (1e15, pack_sizing.MAX_SLOTS["cpu"])):
        monkeypatch.setattr(pack_sizing, "free_bytes", lambda device, free=free: free)
        assert pack_sizing.fitting_slots(evaluator, wanted[:1]) == slots

    def scarce(*_: Any) -> int:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(pack_sizing, "step_bytes", scarce)
    assert pack_sizing.fitting_slots(evaluator, wanted) == 1


def test_a_backbone_of_a_lower_precision(tmp_path: Path) -> None:
    """bf16 activations, fp32 adapters: the pack rounds in other places than a candidate alone, and no more."""
    folder = save(MODELS["llama"](), tmp_path, word_tokenizer())
    loaded = load_backbone(folder, task="classification", labels=LABELS, dtype="bfloat16")
    wanted = requests(mixed(loaded))
    evaluator = together(loaded, pack=4, cache=ActivationCache(10**7))
    with evaluator.attach(wanted[0]) as attachment:
        assert {p.dtype for p, _ in attachment.trainable()} == {torch.float32}
    compare(evaluator.evaluate(wanted), alone(loaded).evaluate(wanted), tolerance=2e-2)


# The shared prefix and its cache


def test_lower_layers_run_once(loaded: LoadedBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in rows: the layers below the adapters see each example once, or once ever with a cache."""
    layers = [loaded.model.get_submodule(path) for path in layer_paths(loaded.backbone)]
    counted = [0] * LAYERS
    classes = {type(layer) for layer in layers}
    (layer_class,) = classes
    forward = layer_class.forward

    def counting(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted[layers.index(self)] += len(hidden)
        return forward(self, hidden, *args, **kwargs)

    monkeypatch.setattr(layer_class, "forward", counting)
    wanted = requests([at(loaded, Lora(rank=2), 2)] * 4)
    cache = ActivationCache(10**7)
    expected = {None: 160 + 50, cache: 80 + 50}
    for where, lower in expected.items():
        evaluator = together(loaded, pack=4, cache=where)
        counted[:] = [0] * LAYERS
        evaluator.evaluate(wanted)
        assert counted == [lower, lower, 4 * 210, 4 * 210]
    evaluator = together(loaded, pack=4, cache=cache)
    counted[:] = [0] * LAYERS
    evaluator.evaluate(wanted)
    assert counted[:2] == [0, 0], "another evaluator over the same model and data finds it"


def test_the_cache_knows_a_changed_model_and_changed_data(loaded: LoadedBackbone) -> None:
    evaluator = together(loaded, cache=ActivationCache(10**7))
    key = evaluator._model_key
    parameter = next(p for n, p in loaded.model.named_parameters() if "layer" in n)
    with torch.no_grad():
        parameter.view(-1)[0] += 1e-3
        assert fingerprint(loaded.model, loaded.backbone) != key
        parameter.view(-1)[0] -= 1e-3
    tokens = {evaluator._token_key(split) for split in ("train", "validation", "test")}
    assert len(tokens) == 3
    shorter = PackedEvaluator(loaded, "classification", SPLITS, max_length=5, cache=ActivationCache(10**7))
    assert shorter._token_key("train") not in tokens


def test_the_cache_holds_its_limits(tmp_path: Path) -> None:
    device = torch.device("cpu")
    cache = ActivationCache(1000, tmp_path, max_disk_bytes=1200)
    made: list[str] = []

    def get(key: str) -> torch.Tensor:
        return cache.get(key, lambda: made.append(key) or torch.full((100,), float(ord(key))), device)

    for key in "abcab":
        assert get(key).tolist() == [float(ord(key))] * 100
    # Two of 400 bytes in memory; files of some 500 bytes, of which two fit as well.
    assert made[:3] == ["a", "b", "c"]
    assert sum(tensor.nbytes for tensor in cache._in_memory.values()) <= 1000
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= 1200


def test_a_broken_file_costs_its_computation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cpu")
    ActivationCache(1000, tmp_path).get("a", lambda: torch.ones(3), device)
    (tmp_path / "a.safetensors").write_bytes(b"half a file")
    assert ActivationCache(1000, tmp_path).get("a", lambda: torch.zeros(3), device).tolist() == [0.0] * 3
    assert "computing them again" in caplog.text
    assert ActivationCache(1000, tmp_path).get("a", lambda: torch.ones(3), device).tolist() == [0.0] * 3
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert ActivationCache(1000, blocked / "sub").get("a", lambda: torch.ones(3), device).tolist() == [1.0] * 3
    assert "cannot write the cached activations" in caplog.text


def test_a_slot_is_taken_off_and_put_on_again(loaded: LoadedBackbone) -> None:
    """Values, moments and random streams move between packs without a trace."""
    evaluator = together(loaded)
    runs = [evaluator._run(k, request, all_columns=False) for k, request in enumerate(requests(mixed(loaded)))]

    def attached(chosen: Sequence[Any]) -> Any:
        architectures = [run.request.candidate.architecture for run in chosen]
        return Attachment(loaded.model, loaded.backbone, architectures, [0] * len(chosen))

    with attached(runs) as attachment:
        optimizer = packed.PackedAdamW(attachment, [run.training for run in runs])
        losses = evaluator._steps_of(runs, attachment, optimizer, 4, lambda ahead: None)
        assert len(losses) == 4
        before = [{g: {n: v.clone() for n, v in d.items()} for g, d in optimizer.parts(k).items()} for k in range(4)]
        kept = [SlotState.capture(attachment, optimizer, k) for k in range(4)]
    chosen = [runs[3], runs[0]]
    with attached(chosen) as attachment:
        optimizer = packed.PackedAdamW(attachment, [run.training for run in chosen])
        for k, run in enumerate(chosen):
            kept[run.index].restore(attachment, optimizer, k)
            torch.testing.assert_close(optimizer.parts(k), before[run.index], rtol=0, atol=0)
