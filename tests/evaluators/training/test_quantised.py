"""Training on quantised backbones: in packs as alone, with gradients through frozen weights, and in little memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.backbones import LoadedBackbone, load_backbone
from autopeft.evaluators.costs import measurement
from autopeft.evaluators.quantization import dequantize
from autopeft.evaluators.training.activations import ActivationCache, fingerprint
from autopeft.search_space.adapters import Dora, Full, Lora
from autopeft.search_space.adapters.lora import FROM_SITE
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.linear import weight_of
from autopeft.search_space.backbones.quantized import is_quantized

from ...support import conformance
from ...support.slow import QUICK_FAMILY, mostly_slow
from ...support.tiny_models import save, seeded, word_tokenizer
from .test_packed import LABELS, SHAPE, alone, at, compare, mixed, requests, together

pytest.importorskip("bitsandbytes")
torch.set_num_threads(1)

MODELS: dict[str, Any] = {
    "bert": lambda: seeded(BertForSequenceClassification, BertConfig(**SHAPE, vocab_size=40, num_labels=3)),
    "llama": lambda: seeded(
        LlamaForSequenceClassification, LlamaConfig(**SHAPE, vocab_size=40, num_labels=3, pad_token_id=0)
    ),
}
CASES = [("bert", "nf4"), ("llama", "nf4"), ("llama", "int8")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: save(make(), tmp_path_factory.mktemp(name), word_tokenizer()) for name, make in MODELS.items()}


def load(folder: str, quantization: str | None) -> LoadedBackbone:
    loaded = load_backbone(folder, task="classification", labels=LABELS, quantization=quantization)
    return replace(loaded, pretrained_head=False)


@pytest.fixture(scope="module", params=mostly_slow(CASES, (QUICK_FAMILY, "nf4")), ids="-".join)
def loaded(request: pytest.FixtureRequest, folders: dict[str, str]) -> LoadedBackbone:
    name, quantization = request.param
    return load(folders[name], quantization)


def in_full(loaded: LoadedBackbone, folder: str) -> LoadedBackbone:
    """The same values in plain linears: the reference."""
    other = load(folder, loaded.backbone.quantization)
    dequantize(other.model)
    return replace(other, backbone=replace(other.backbone, quantization=None))


KINDS = [row.kind for row in conformance.ROWS if row.kind != "full"]


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "lora"))
def test_a_candidate_in_a_pack_is_the_candidate_alone_and_on_the_dequantised_weights(
    loaded: LoadedBackbone, folders: dict[str, str], kind: str
) -> None:
    row = next(row for row in conformance.ROWS if row.kind == kind)
    own = [at(loaded, spec, k % 3, row.roles) for k, spec in enumerate(row.specs)]
    if not any(own):
        pytest.skip(f"{loaded.backbone.family} has no site for {kind}")
    wanted = requests([*own, at(loaded, Lora(rank=2, dropout=0.3), 0)])
    found = together(loaded, pack=8).evaluate(wanted)
    # With noise on a router, last digits decide a choice of experts, on plain weights of the same values too.
    tolerance = 1e-3 if kind == "mixture" else 1e-5
    compare(found, alone(loaded).evaluate(wanted), tolerance)
    folder = folders["bert" if loaded.backbone.family == "bert" else "llama"]
    compare(found, alone(in_full(loaded, folder)).evaluate(wanted), tolerance)


def test_cached_lower_layers_and_packs_of_every_size(loaded: LoadedBackbone, tmp_path: Path) -> None:
    wanted = requests(mixed(loaded))
    expected = alone(loaded).evaluate(wanted)
    for cache in (ActivationCache(10**7, tmp_path), ActivationCache(10**7, tmp_path)):
        evaluator = together(loaded, pack=3, cache=cache)
        assert evaluator.lower_layers is not None
        compare(evaluator.evaluate(wanted), expected)


def test_gradients_through_the_frozen_weights_are_those_of_the_dequantised_weights(
    loaded: LoadedBackbone, folders: dict[str, str]
) -> None:
    reference = in_full(loaded, folders["bert" if loaded.backbone.family == "bert" else "llama"])
    wanted = [at(loaded, Dora(rank=3, dropout=0.5), 0), at(loaded, Lora(rank=2), 0)]

    def gradients(of: LoadedBackbone) -> list[Tensor]:
        with Attachment(of.model, of.backbone, wanted, [0, 1]) as attachment:
            with torch.no_grad():  # away from the start, where B is zero and A gets no gradient
                for parameter, _ in attachment.trainable():
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
            ids = torch.arange(4, 20).view(2, 8)
            of.model(input_ids=ids.repeat(2, 1), attention_mask=torch.ones(4, 8)).logits.square().sum().backward()
            found = [parameter.grad for parameter, _ in attachment.trainable()]
        assert all(gradient is not None for gradient in found)
        return [gradient for gradient in found if gradient is not None]

    for ours, theirs in zip(gradients(loaded), gradients(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_no_dequantised_weight_is_kept_for_the_backward_pass(loaded: LoadedBackbone) -> None:
    sizes = {weight_of(module).numel() for module in _quantised(loaded.model)}
    resident = {parameter.data_ptr() for parameter in loaded.model.parameters()}
    adapted = at(loaded, Dora(rank=1, dropout=0.5), 0, ("attn.q", "mlp.up", "mlp.down"))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with (
        Attachment(loaded.model, loaded.backbone, [adapted], [0]),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loaded.model(input_ids=torch.arange(4, 11)[None])
    assert saved
    new = [tensor for tensor in saved if tensor.data_ptr() not in resident]
    assert not [tensor.shape for tensor in new if tensor.dim() == 2 and tensor.numel() in sizes]


def test_training_does_not_change_what_is_stored(loaded: LoadedBackbone) -> None:
    before, model = loaded.weights(), loaded.model
    together(loaded).evaluate(requests([at(loaded, Lora(rank=2), 1)]))
    assert loaded.weights() == before
    assert not any(module.weight.requires_grad for module in _quantised(model))


def _quantised(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_quantized(module)]


def test_fingerprints_cover_the_scales(loaded: LoadedBackbone) -> None:
    digests = loaded.weights(), fingerprint(loaded.model, loaded.backbone)
    weight: Any = _quantised(loaded.model)[0].weight
    scale = weight.quant_state.absmax if loaded.backbone.quantization == "nf4" else weight.SCB
    scale.mul_(2.0)
    changed = loaded.weights(), fingerprint(loaded.model, loaded.backbone)
    scale.div_(2.0)
    assert digests[0] != changed[0]
    assert digests[1] != changed[1]


def test_memory_counts_weights_as_they_are_stored(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "MAX_REPEATS", measurement.MIN_REPEATS)  # no speed is asserted
    measured = {}
    for quantization in (None, "int8", "nf4"):
        loaded = load(folders["llama"], quantization)
        request = requests([at(loaded, Lora(rank=1), 3)])[0]
        costs = alone(loaded).costs(request.candidate, frozenset({"peak_memory_bytes", "latency_s", "step_s"}))
        measured[quantization] = costs.values["peak_memory_bytes"]
        assert costs.values["num_params"] == request.candidate.architecture.num_params(loaded.backbone)
    assert measured["nf4"] < measured["int8"] < measured[None]


def test_what_needs_the_weights_in_full_is_refused(loaded: LoadedBackbone) -> None:
    with pytest.raises(ValueError, match="no site 'backbone'"):
        Attachment(loaded.model, loaded.backbone, [Architecture.of({"backbone": [Full()]})], [0])
    request = requests([at(loaded, Lora(rank=1), 3)])[0]
    with pytest.raises(ValueError, match="cannot be merged into quantised weights"):
        alone(loaded).costs(request.candidate, frozenset({"merged_latency_s"}))


@pytest.mark.parametrize("init", FROM_SITE)
def test_inits_read_the_dequantised_weights_and_inputs(
    loaded: LoadedBackbone, folders: dict[str, str], init: str
) -> None:
    """The offset is beside the stored weight, so the start is exact: no weight is quantised again."""
    reference = in_full(loaded, folders["bert" if loaded.backbone.family == "bert" else "llama"])
    wanted = [at(loaded, Lora(rank=2, init=init), 2)]
    ids, mask = torch.arange(4, 20).view(2, 8), torch.ones(2, 8)
    states, logits = [], []
    for of in (loaded, reference):
        with alone(of).attached(wanted, [3]) as attachment, torch.no_grad():
            states.append({name: value for name, value in attachment.state().items() if "/lora/" in name})
            logits.append(of.model(input_ids=ids, attention_mask=mask).logits)
    with alone(loaded).attached([Architecture()], [3]), torch.no_grad():
        bare = loaded.model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[0], bare, atol=1e-5, rtol=1e-5)
    products = []
    for state in states:
        names = [name.removesuffix("/A") for name in state if name.endswith("/A")]
        products.append({name: state[f"{name}/A"].T @ state[f"{name}/A"] for name in names})
    torch.testing.assert_close(products[0], products[1], atol=1e-4, rtol=1e-3)
