"""Families of models: a candidate in a pack, with shared lower layers, is the candidate alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from autopeft.evaluators.base import Request
from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.training.activations import ActivationCache
from autopeft.evaluators.training.packed import PackedEvaluator
from autopeft.evaluators.training.train import TrainEvaluator
from autopeft.search_space.adapters import AdapterSpec, Bitfit, Bottleneck, Lora, Norm
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone

from ...support import conformance
from ...support.families import FAMILIES, LAYERS, NAMES, Family, earlier_tokens_only
from .test_packed import compare, requests
from .test_train import LABELS, rows

torch.set_num_threads(1)

#: One family of each form; the others are slow tests.
FORMS = {
    "Bert", "ModernBert", "RoFormer", "MPNet", "DebertaV2", "Nystromformer", "Albert", "GPT2", "GPTNeo", "Bloom",
    "Falcon-alibi", "Mpt", "OPT", "Llama", "Gemma2", "Cohere", "Mixtral", "Qwen2Moe", "GptOss",
}  # fmt: skip
every_family = pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
form_or_slow = pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, id=name, marks=() if name in FORMS else pytest.mark.slow)
        for f, name in zip(FAMILIES, NAMES, strict=True)
    ],
)


def splits(family: Family) -> Splits:
    found = [rows(split, count) for split, count in (("train", 24), ("validation", 8), ("test", 4))]
    if family.is_causal_lm:
        return Splits(*([{"text": row["text"]} for row in part] for part in found), None)
    return Splits(*found, LABELS)


def evaluators(family: Family) -> tuple[PackedEvaluator, TrainEvaluator]:
    loaded, data = family.loaded(), splits(family)
    task = "causal-lm" if family.is_causal_lm else "classification"
    packed = PackedEvaluator(loaded, task, data, max_length=16, pack=8, cache=ActivationCache(10**7))
    return packed, TrainEvaluator(loaded, task, data, max_length=16)


def placed(spec: AdapterSpec, backbone: Backbone, lowest: int = 0, without: Sequence[str] = ()) -> Architecture:
    """`spec` at every site of the layers from `lowest` on that it fits, or of the last if there are fewer layers."""
    lowest = min(lowest, backbone.num_layers - 1)
    roles = set(spec.roles) - set(without)
    inside = [site for site in backbone.sites if site.layer is not None and site.layer >= lowest]
    return Architecture.of({site.name: [spec] for site in inside if site.role in roles and spec.fits(site)})


def short(architectures: list[Architecture]) -> list[Request]:
    """Requests for three steps."""
    found = requests(architectures)
    shorter = [{**request.candidate.training, "epochs": 1} for request in found]
    return [
        replace(request, candidate=replace(request.candidate, training=training))
        for request, training in zip(found, shorter, strict=True)
    ]


@form_or_slow
def test_a_candidate_in_a_pack_is_the_candidate_alone(family: Family) -> None:
    """Three steps, several types of adapters, from layer 0, 1 and 2 on, and the head alone."""
    packed, train = evaluators(family)
    backbone = packed.backbone
    assert backbone.causal == earlier_tokens_only(packed.model)
    notes = "; ".join(packed.notes)
    assert (family.unshared in notes) if family.unshared else (packed.lower_layers is not None)
    assert {s.role for s in backbone.sites if s.name in packed.unpackable} == set(family.alone)
    mixed = [
        placed(Lora(rank=2), backbone),
        placed(Lora(rank=3, dropout=0.2), backbone, 1),
        placed(Bottleneck(size=3, form="parallel", init="houlsby"), backbone, 2),
        placed(Norm(), backbone, 1) or placed(Bitfit(), backbone, 1),
    ]
    wanted = short([one for one in mixed if one])
    if backbone.head_modules:
        wanted += short([Architecture()])
    compare(packed.evaluate(wanted), train.evaluate(wanted), tolerance=2e-5)


@pytest.mark.slow
@every_family
def test_every_type_that_fits_a_site_of_the_family_can_be_trained(family: Family) -> None:
    """And merged where it says so; other types fit none, which `validate` says."""
    packed, train = evaluators(family)
    backbone = packed.backbone
    untaken = []
    for row in conformance.ROWS:
        if row.kind in ("full", "head"):
            continue
        # A router would take the relative positions of DeBERTa for tokens.
        without = family.alone if row.kind == "mixture" else ()
        own = [placed(spec, backbone, k % LAYERS, without) for k, spec in enumerate(row.specs)]
        if not any(own):
            untaken.append(row.kind)
            continue
        wanted = short([one for one in own if one])
        compare(packed.evaluate(wanted), train.evaluate(wanted), tolerance=5e-5)
        if row.specs[0].mergeable:
            merges(train, wanted[0])
    assert set(family.untaken) <= set(untaken)


def merges(evaluator: TrainEvaluator, request: Request) -> None:
    batch, _ = evaluator.small_batch()
    with evaluator.attach(request) as attachment, torch.no_grad():
        for value, _ in attachment.trainable():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
        attachment.eval()
        apart = evaluator.task.scores(evaluator.model, batch)["loss"]
        with attachment.merged():
            torch.testing.assert_close(
                evaluator.task.scores(evaluator.model, batch)["loss"], apart, atol=1e-4, rtol=1e-4
            )
