"""The adapter types and the host that attaches them, over the rows of `conformance.py`."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.training.optimizer import PackedAdamW
from autopeft.search_space.adapters import (
    ADAPTERS,
    AdapterSpec,
    Bitfit,
    Bottleneck,
    Dora,
    Full,
    Ia3,
    Lora,
    Mixture,
    Norm,
    Prefix,
    Ssf,
)
from autopeft.search_space.adapters import dora as dora_module
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.runtime import bank as bank_module
from autopeft.search_space.runtime.bank import Bank, Call, stream
from autopeft.search_space.training import Training
from autopeft.testing.adapters import (
    CHECKS,
    AdapterCheck,
    assert_same,
    assert_slots_equal_alone,
    gradients,
    noisy,
    slots_in_a_pack,
)
from autopeft.testing.models import FAMILIES, tiny, tokens

from ...support.conformance import ROWS, Peft, Row
from ...support.slow import slow

torch.set_num_threads(1)

CASES = [pytest.param(row, spec, id=f"{row.kind}-{i}") for row in ROWS for i, spec in enumerate(row.specs)]
#: Types whose parameters are a bank, which is all but full fine-tuning.
BANKED = [row for row in ROWS if row.kind != "full"]
#: Types that change activations, which a bank's forward pass shows (a prefix changes attention).
ACTING = [row for row in BANKED if row.kind != "prefix"]

every_case = pytest.mark.parametrize(("row", "spec"), CASES)
CHECKED = ("bert", "llama-causal", "gpt2")
every_family = pytest.mark.parametrize("family", CHECKED)
#: The first settings of a type in two families, its others in the third; the rest are slow tests.
every_case_in_a_family = pytest.mark.parametrize(
    ("row", "spec", "family"),
    [
        pytest.param(
            row,
            spec,
            family,
            id=f"{row.kind}-{i}-{family}",
            marks=[pytest.mark.slow] * (len(row.specs) > 1 and (i > 0) != (family == "llama-causal")),
        )
        for row in ROWS
        for i, spec in enumerate(row.specs)
        for family in CHECKED
    ],
)


def kinds(rows: list[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=[row.kind for row in rows])


@functools.cache
def backbone_of(family: str) -> Backbone:
    return tiny(family)[1]


def placed(row: Row, spec: AdapterSpec, backbone: Backbone) -> Architecture:
    architecture = row.place(spec, backbone)
    if not architecture:
        pytest.skip(f"{row.kind} fits no site of this family")
    return architecture


def head_of(attachment: Attachment) -> dict[str, Tensor]:
    return {name: value for name, value in attachment.state().items() if name.startswith("head.")}


def test_every_type_has_a_row() -> None:
    assert sorted(row.kind for row in ROWS) == sorted([*ADAPTERS, Mixture.kind])
    assert all(spec.kind == row.kind for row in ROWS for spec in row.specs)


def test_every_type_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "adapters.md").read_text()
    assert not [kind for kind in ADAPTERS if f"\n| `{kind}` |" not in page]


# One adapter on a model


@every_case_in_a_family
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_passes_the_checks_of_plug_ins(check: AdapterCheck, row: Row, spec: AdapterSpec, family: str) -> None:
    placed(row, spec, backbone_of(family))
    check(spec, family, row.roles)


# Slots


@every_family
@kinds(BANKED)
def test_slot_alone_is_the_slot_in_a_pack(row: Row, family: str) -> None:
    placed(row, row.specs[0], backbone_of(family))
    slots_in_a_pack(row.specs, family, row.roles)


@every_family
def test_pack_of_different_kinds_and_sites(family: str) -> None:
    model, backbone = tiny(family)
    architectures = [row.place(row.specs[0], backbone) for row in BANKED]
    assert_slots_equal_alone(model, backbone, architectures)


def stacked(backbone: Backbone) -> Architecture:
    """Several adapters at one site, two of them alike, wherever they fit."""
    specs = (Lora(rank=2, alpha=3.0), Lora(rank=2, alpha=3.0), Dora(rank=3), Norm(), Bitfit(), Ssf(), Ia3())
    return Architecture.of(
        {s.name: [spec for spec in specs if s.role in spec.roles and spec.fits(s)] for s in backbone.sites}
    )


@every_family
def test_several_adapters_at_one_site(family: str) -> None:
    model, backbone = tiny(family)
    architecture = stacked(backbone)
    assert max(len(specs) for _, specs in architecture.adapters) >= 4
    assert_slots_equal_alone(model, backbone, [Architecture(), architecture])
    with Attachment(model, backbone, [architecture], [1]) as attachment:
        state = attachment.state()
        twins = [name for name in state if name.endswith("/lora#2/A")]
        assert twins
        assert not any(torch.equal(state[n], state[n.replace("#2", "")]) for n in twins)
        attachment.load_state({name: v + 0.05 * torch.randn_like(v) for name, v in state.items()})
        attachment.eval()
        apart = model(tokens()).logits
        with attachment.merged(), attachment.bare():
            torch.testing.assert_close(model(tokens()).logits, apart, atol=1e-5, rtol=1e-5)


def test_merging_leaves_the_others_hooked() -> None:
    model, backbone = tiny("bert")
    specs = (Lora(rank=2), Ia3(), Bottleneck(size=3), Bottleneck(size=2, form="parallel"), Prefix(length=2))
    architecture = Architecture.of(
        {site.name: [spec for spec in specs if site.role in spec.roles] for site in backbone.sites}
    )
    with Attachment(model, backbone, [architecture], [1]) as attachment:
        attachment.load_state(noisy(attachment))
        attachment.eval()
        apart = model(tokens()).logits
        with attachment.merged():
            torch.testing.assert_close(model(tokens()).logits, apart, atol=1e-5, rtol=1e-5)
            with attachment.bare():
                assert (model(tokens()).logits - apart).norm() > 1e-3 * apart.norm()
        assert torch.equal(model(tokens()).logits, apart)


@kinds(ACTING)
def test_supernet_slice_is_a_stand_alone_module(row: Row) -> None:
    model, backbone = tiny("bert")
    site = row.sites(backbone)[0]
    base = model.get_submodule(site.module)
    for structure in {spec.structure() for spec in row.specs}:
        specs = [spec for spec in row.specs if spec.structure() == structure]
        supernet = Bank(site, specs, base, range(len(specs)), bank_of_slot=[0] * len(specs))
        assert all(len(values) == 1 for values in supernet.values.values())
        with torch.no_grad():
            for values in supernet.values.values():
                values.add_(0.1 * torch.randn_like(values))
        x = torch.randn(len(specs), 7, site.in_features)
        y = torch.randn(len(specs), 7, site.out_features)
        supernet.eval()
        out = supernet(supernet.apply_input(x), y)
        for k, spec in enumerate(specs):
            alone = Bank(site, [spec], base, [0]).eval()
            alone.load_slot(0, supernet.of_slot(k))
            expected = alone(alone.apply_input(x[k : k + 1]), y[k : k + 1])
            torch.testing.assert_close(out[k : k + 1], expected, atol=1e-6, rtol=1e-5)


@kinds([row for row in ACTING if not row.straight_through])
def test_gradients_are_derivatives(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    model, backbone = tiny("bert")
    model.double()
    # Of DoRA's gradient the norm is no part: here it is a constant for the numerical derivative, too.
    monkeypatch.setattr(dora_module, "_row_norms", lambda w, *_: 1.0 + w.square().sum(1).sqrt())
    for site in {site.role: site for site in row.sites(backbone)}.values():
        for structure in {spec.structure() for spec in row.specs}:
            specs = [spec for spec in row.specs if spec.structure() == structure]
            bank = Bank(site, specs, model.get_submodule(site.module), range(len(specs))).double().eval()
            values = list(bank.values.values())
            with torch.no_grad():
                for value in values:
                    value.add_(0.1 * torch.randn_like(value))
            x = torch.randn(len(specs), 2, site.in_features, dtype=torch.double, requires_grad=True)
            y = torch.randn(len(specs), 2, site.out_features, dtype=torch.double, requires_grad=True)

            def run(x: Tensor, y: Tensor, *values: Tensor, bank: Bank = bank) -> Tensor:
                return bank(bank.apply_input(x), y)

            assert torch.autograd.gradcheck(run, (x, y, *values), fast_mode=True)


# The same in Hugging Face's peft


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", list(FAMILIES))
@every_case
def test_equals_peft(row: Row, spec: AdapterSpec, family: str) -> None:
    from peft import get_peft_model

    if not isinstance(row.peft, Peft):
        pytest.skip(row.peft)
    if row.peft.specs is not None and spec not in row.peft.specs:
        pytest.skip("peft has it for other settings")
    if family in row.peft.without:
        pytest.skip(f"peft's type does not know the linears of {family}")
    model, backbone = tiny(family)
    sites = row.sites(backbone, row.peft.roles)
    if not sites:
        pytest.skip(f"{row.kind} fits no site of this family")
    theirs = get_peft_model(copy.deepcopy(model), row.peft.config(spec, sites)).eval()
    trainable = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    architecture = row.place(spec, backbone, row.peft.roles)
    assert sum(p.numel() for p in trainable.values()) == architecture.num_params(backbone)

    def by_peft_name(state: dict[str, Tensor], with_base: bool) -> dict[str, Tensor]:
        named = {}
        for site in sites:
            base = model.get_submodule(site.module)
            values = {n.rpartition("/")[2]: v for n, v in state.items() if n.startswith(f"{site.name}/")}
            if not with_base:  # a gradient is the same with respect to a change
                base = copy.deepcopy(base)
                for parameter in base.parameters():
                    parameter.zero_()
            named |= {f"base_model.model.{site.module}.{n}": v for n, v in row.peft.values(values, base).items()}
        return named

    with Attachment(model, backbone, [architecture], [1], pretrained_head=True) as attachment:
        state = noisy(attachment) | head_of(attachment)
        attachment.load_state(state)
        with torch.no_grad():
            values = by_peft_name(state, with_base=True)
            theirs_by_name = trainable | {n: b for n, b in theirs.named_buffers() if n in values}
            assert values.keys() == theirs_by_name.keys()
            for name, tensor in theirs_by_name.items():
                tensor.copy_(values[name].view_as(tensor))
        attachment.eval()
        ours, others = model(tokens()).logits, theirs(input_ids=tokens()).logits
        torch.testing.assert_close(ours, others, atol=1e-5, rtol=1e-5)
        if not row.peft.gradients:
            return
        ours.square().mean().backward()
        others.square().mean().backward()
        with torch.no_grad():
            found = by_peft_name(gradients(attachment), with_base=False)
            found = {name: gradient for name, gradient in found.items() if name in trainable}
        expected = {name: p.grad for name, p in trainable.items()}
        assert_same({n: v.view_as(expected[n]) for n, v in found.items()}, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spec", [Lora(rank=2, dropout=0.5), Dora(rank=2, dropout=0.5)], ids=lambda s: s.kind)
def test_dropout_acts_where_it_does_in_peft(spec: Lora, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import get_peft_model

    class Half(nn.Module):
        """Stands in for the random dropout of both."""

        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x

    monkeypatch.setattr(Call, "dropout", lambda self, x: 0.5 * x)
    model, backbone = tiny("llama-causal")
    row = next(row for row in ROWS if row.kind == spec.kind)
    sites = row.sites(backbone)
    theirs = get_peft_model(copy.deepcopy(model), row.peft.config(spec, sites)).train()
    with Attachment(model, backbone, [row.place(spec, backbone)], [1]) as attachment, torch.no_grad():
        attachment.load_state(noisy(attachment))
        for bank in attachment.banks:
            layer = theirs.get_submodule(f"base_model.model.{bank.site.module}")
            layer.lora_dropout["default"] = Half()
            for name, value in row.peft.values(bank.of_slot(0), bank.base[0]).items():
                layer.get_parameter(name).copy_(value)
        attachment.train()
        expected = theirs(input_ids=tokens()).logits
        torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-5, rtol=1e-5)


def test_bitfit_is_training_the_bias() -> None:
    model, backbone = tiny("bert")
    row = next(row for row in ROWS if row.kind == "bitfit")
    sites = row.sites(backbone)
    model(tokens()).logits.square().mean().backward()
    expected = {f"{site.name}/bitfit/b": model.get_submodule(site.module).bias.grad.clone() for site in sites}
    model.zero_grad()
    with Attachment(model, backbone, [row.place(Bitfit(), backbone)], [1], pretrained_head=True) as attachment:
        attachment.eval()
        model(tokens()).logits.square().mean().backward()
        found = {n: v for n, v in gradients(attachment).items() if not n.startswith("head.")}
    assert_same(found, expected, atol=1e-6, rtol=1e-5)


# The host


def test_norm_of_an_unknown_formula_is_refused() -> None:
    site = tiny("bert")[1].site("norm.embed")
    bank = Bank(site, [Norm()], nn.GroupNorm(2, site.in_features), [1])
    with pytest.raises(ValueError, match="does not support GroupNorm"):
        bank(*torch.randn(2, 1, 3, site.in_features))


def test_full_trains_all_but_the_head_in_place() -> None:
    model, backbone = tiny("bert")
    head = model.classifier.weight.clone()
    embedding = model.bert.embeddings.word_embeddings.weight
    before = embedding.clone()
    with Attachment(model, backbone, [Architecture.of({"backbone": [Full()]})], [1]) as attachment:
        attachment.train()
        assert model.training
        assert not model.classifier.weight.requires_grad
        optimiser = torch.optim.SGD([p for p, _ in attachment.trainable()], lr=0.1)
        model(tokens()).logits.square().sum().backward()
        optimiser.step()
        assert not torch.equal(embedding, before)
    assert torch.equal(embedding, before)
    assert embedding.grad is None
    assert torch.equal(model.classifier.weight, head)


def test_frozen_backbone_stays_in_evaluation_mode() -> None:
    model, backbone = tiny("bert")
    row = next(row for row in ROWS if row.kind == "lora")
    with Attachment(model, backbone, [row.place(Lora(rank=2), backbone)], [1]) as attachment:
        attachment.train()
        assert attachment.training
        assert not model.training
        trained = {id(p) for p, _ in attachment.trainable()}
        assert not any(p.requires_grad for p in model.parameters())
        assert all(id(p) in trained for p in attachment.parameters())


@kinds(ACTING)
def test_backbone_of_lower_precision(row: Row) -> None:
    model, backbone = tiny("bert")
    model.bfloat16()
    with Attachment(model, backbone, [row.place(row.specs[0], backbone)], [1]) as attachment:
        logits = model(tokens()).logits
        assert logits.dtype == torch.bfloat16
        logits.float().square().sum().backward()
        for parameter, _ in attachment.trainable():
            assert parameter.dtype == torch.float32
            assert parameter.grad.isfinite().all()


def test_weight_decay_leaves_vectors_out() -> None:
    model, backbone = tiny("bert")
    for row in BANKED:
        if row.kind == "sparseadapter":
            continue  # its vectors are what is left of matrices
        with Attachment(model, backbone, [row.place(row.specs[0], backbone)], [1]) as attachment:
            assert not any(decay and value.dim() < 3 for value, decay in attachment.trainable()), row.kind


@pytest.mark.parametrize(
    ("adapters", "complaint"),
    [
        ({"layers.0.attn.z": [Lora()]}, "no site 'layers.0.attn.z'"),
        ({"layers.0.norm.0": [Lora()]}, "'lora' cannot be attached at 'layers.0.norm.0'"),
        ({"layers.0.attn.q": [Bitfit()]}, "'bitfit' cannot be attached at 'layers.0.attn.q'"),
        ({"layers.0.attn.q": [Dora(rank=2), Dora(rank=3)]}, "two adapters of kind 'dora'"),
    ],
)
def test_refuses_what_cannot_be_placed(adapters: dict[str, list[AdapterSpec]], complaint: str) -> None:
    model, backbone = tiny("llama-causal")
    with pytest.raises(ValueError, match=complaint):
        Attachment(model, backbone, [Architecture.of(adapters)], [1])
    assert all(p.requires_grad for p in model.parameters())


def test_refuses_to_train_the_backbone_in_a_pack() -> None:
    model, backbone = tiny("bert")
    with pytest.raises(ValueError, match="cannot share it"):
        Attachment(model, backbone, [Architecture.of({"backbone": [Full()]}), Architecture()], [1, 2])


def test_slots_of_one_bank_agree_in_structure() -> None:
    model, backbone = tiny("bert")
    site = backbone.site("layers.0.attn.q")
    base = model.get_submodule(site.module)
    with pytest.raises(ValueError, match="same structure"):
        Bank(site, [Lora(), Dora()], base, [1, 2])
    with pytest.raises(ValueError, match="shape"):
        Bank(site, [Lora(rank=2)], base, [1]).load_slot(0, Bank(site, [Lora(rank=3)], base, [1]).of_slot(0))


@pytest.mark.parametrize("family", [slow("bert"), "llama-causal"])  # GPT-2 asks a mask for its values
@kinds(BANKED)
def test_a_step_of_a_pack_stays_on_the_devices_of_its_backbone(
    row: Row, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch's meta device, which computes shapes alone: a tensor that is made on the CPU meets one of another
    device and raises, as it would on a GPU."""
    monkeypatch.setattr(bank_module, "stream", lambda *words, device="cpu": stream(*words))  # meta has no generators
    model, backbone = tiny(family)
    model.to("meta")
    architectures = [placed(row, spec, backbone) for spec in row.specs]
    seeds = list(range(len(architectures)))
    with Attachment(model, backbone, architectures, seeds, draw=False) as attachment:
        optimizer = PackedAdamW(attachment, [Training(learning_rate=0.1)] * len(seeds))
        logits = model(tokens(len(seeds)).to("meta")).logits
        losses = logits.float().view(len(seeds), -1).mean(1)
        attachment.routers.penalised(losses).sum().backward()
        optimizer.step(1, torch.zeros(len(seeds), device="meta"))
    assert losses.device.type == "meta"
