"""What types that act linearly on a linear layer compute, beside slow references, and how they are merged together."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.search_space.adapters import (
    AdapterBias,
    AdapterSpec,
    Bitfit,
    Boft,
    C3a,
    Delora,
    Dora,
    Flora,
    Gralora,
    Hira,
    Hra,
    Hydra,
    Ia3,
    Loha,
    Lokr,
    Lora,
    Miss,
    MultiLora,
    Oft,
    Road,
    Ssf,
)
from autopeft.search_space.adapters.linear_operators import divisors, nearest_divisor
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Site
from autopeft.search_space.runtime.bank import Bank
from autopeft.testing.adapters import noisy
from autopeft.testing.models import tiny, tokens

torch.set_num_threads(1)

IN, OUT = 24, 16
SITE = Site(name="s", layer=0, role="attn.q", module="s", input_module="s", in_features=IN, out_features=OUT, bias=True)


def random_bank(spec: AdapterSpec, *, noise: float = 0.5) -> tuple[Bank, nn.Linear, dict[str, Tensor]]:
    """A bank of one slot with random values in double precision, its linear, and the values."""
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT).double()
    bank = Bank(SITE, [spec], base, [0]).double().eval()
    with torch.no_grad():
        for value in bank.values.values():
            value.add_(noise * torch.randn_like(value))
    return bank, base, bank.of_slot(0)


@torch.no_grad()
def output(bank: Bank, base: nn.Linear, x: Tensor) -> Tensor:
    """What the linear with the adapter makes of x: [M, D_in]."""
    turned = bank.apply_input(x[None])
    return bank(turned, base(turned))[0]


@torch.no_grad()
def weight_and_bias(spec: AdapterSpec, noise: float = 0.5) -> tuple[Tensor, Tensor, nn.Linear, dict[str, Tensor]]:
    """The weight and bias that the adapted linear amounts to, found by unit vectors; the linear, and the values."""
    bank, base, values = random_bank(spec, noise=noise)
    units = torch.eye(IN, dtype=torch.double)
    bias = output(bank, base, torch.zeros_like(units[:1]))[0]
    return (output(bank, base, units) - bias).T, bias, base, values


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)  # numbers of slots are in float32


EVERY = [
    Oft(block_size=4),
    Boft(block_size=4, factors=2),
    Hra(pairs=3),
    Road(group_size=4),
    Road(variant=4, group_size=8),
    Loha(rank=3),
    Lokr(rank=2),
    Miss(rank=5),
    C3a(block_size=4),
    Gralora(rank=2),
    Delora(rank=3),
    Flora(rank=3, scale=2.0),
    Hydra(rank=3),
    MultiLora(rank=3),
    AdapterBias(),
    Hira(rank=3),
]


@pytest.mark.parametrize("spec", EVERY, ids=lambda spec: spec.label)
def test_it_is_linear_and_merges(spec: AdapterSpec) -> None:
    weight, bias, base, values = weight_and_bias(spec)
    x = torch.randn(5, IN, dtype=torch.double)
    bank, _, _ = random_bank(spec)
    close(output(bank, base, x), x @ weight.T + bias)
    merged = spec.merge(values, base.weight.detach(), base.bias.detach())
    close(merged[0], weight)
    assert merged[1] is not None
    close(merged[1], bias)
    assert spec.merge(values, base.weight.detach(), None)[1] is None
    assert not torch.allclose(weight, base.weight, atol=1e-3)


# Rotations and reflections


@pytest.mark.parametrize(
    "spec", [Oft(block_size=8), Boft(block_size=4), Boft(block_size=2, factors=3), Hra(pairs=2)], ids=lambda s: s.label
)
def test_orthogonal_types_keep_the_norm_of_the_input(spec: AdapterSpec) -> None:
    bank, _, _ = random_bank(spec, noise=2.0)
    x = torch.randn(1, 7, IN, dtype=torch.double)
    with torch.no_grad():
        turned = bank.apply_input(x)
    close(turned.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(turned, x, atol=0.1)
    # and so the Gram matrix of the rows of the merged weight is that of W, up to BOFT's scale of the outputs
    if not isinstance(spec, Boft):
        weight, _, base, _ = weight_and_bias(spec, noise=2.0)
        close(weight @ weight.T, (base.weight @ base.weight.T).detach())


def test_oft_is_a_block_diagonal_matrix() -> None:
    weight, _, base, values = weight_and_bias(Oft(block_size=4))
    blocks = []
    for numbers in values["Q"]:
        skew = torch.zeros(4, 4, dtype=torch.double)
        number = iter(numbers)
        for i in range(4):
            for j in range(i + 1, 4):
                skew[i, j] = next(number)
                skew[j, i] = -skew[i, j]
        unit = torch.eye(4, dtype=torch.double)
        blocks.append((unit - skew) @ torch.linalg.inv(unit + skew))
    close(weight, (base.weight @ torch.block_diag(*blocks).T).detach())


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_boft_mixes_ever_more_features(factors: int) -> None:
    bank, _, _ = random_bank(Boft(block_size=2, factors=factors))
    with torch.no_grad():
        reached = (bank.apply_input(torch.eye(IN, dtype=torch.double)[None])[0].abs() > 1e-9).sum(1)
    assert reached.tolist() == [2**factors] * IN  # B 2^(m - 1) with B = 2


def test_boft_is_pefts_with_several_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft has several factors only with its CUDA extension, in place of which a function of torch stands here."""
    from peft import BOFTConfig
    from peft.tuners.boft import layer as theirs

    class Blocks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, blocks: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(theirs, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(theirs, "FastBlockDiag", Blocks)
    for spec in (Boft(block_size=4, factors=2), Boft(block_size=2, factors=3)):
        bank, base, values = random_bank(spec)
        config = BOFTConfig(boft_block_size=spec.block_size, boft_n_butterfly_factor=spec.factors)
        module = theirs.Linear(base, "default", config).double()
        with torch.no_grad():
            assert module.boft_R["default"].shape == values["R"].shape
            module.boft_R["default"].copy_(values["R"])
            module.boft_s["default"].copy_(values["s"][:, None])
            # its rotations are in float32
            x = torch.randn(5, IN, dtype=torch.double)
            torch.testing.assert_close(output(bank, base, x), module(x), atol=1e-5, rtol=1e-5)


def test_hra_is_a_product_of_reflections() -> None:
    spec = Hra(pairs=2)
    weight, _, base, values = weight_and_bias(spec)
    product = torch.eye(IN, dtype=torch.double)
    for u in values["U"].T:
        product = product @ (torch.eye(IN, dtype=torch.double) - 2 * torch.outer(u, u) / u.square().sum())
    close(weight, (base.weight @ product).detach())
    assert torch.linalg.matrix_rank(product - torch.eye(IN, dtype=torch.double)) == 2 * spec.pairs


def test_hra_starts_with_pairs_that_cancel_out() -> None:
    base = nn.Linear(IN, OUT)
    u = Bank(SITE, [Hra(pairs=3)], base, [0]).of_slot(0)["U"]
    assert torch.equal(u[:, ::2], u[:, 1::2])
    assert (u[:, 0] - u[:, 2]).norm() > 0.1


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_road_turns_pairs_of_outputs(variant: int) -> None:
    spec = Road(variant=variant, group_size=8)
    weight, bias, base, values = weight_and_bias(spec)
    theta, alpha = values["theta"], values["alpha"]
    turn = torch.zeros(OUT, OUT, dtype=torch.double)
    for group in range(OUT // 8):
        for j in range(4):
            first, second = 8 * group + j, 8 * group + j + 4
            # Places in theta and alpha: of the diagonal and the other element in the rows of the two outputs.
            if variant == 1:
                places = [4 * group + j] * 4
            elif variant == 2:
                places = [first, first, second, second]
            else:
                places = [16 * group + j, 16 * group + j + 8, 16 * group + j + 4, 16 * group + j + 12]
            a, b, c, d = places
            turn[first, first] = alpha[a] * theta[a].cos()
            turn[first, second] = -alpha[b] * theta[b].sin()
            turn[second, first] = alpha[d] * theta[d].sin()
            turn[second, second] = alpha[c] * theta[c].cos()
    close(weight, (turn @ base.weight).detach())
    close(bias, (turn @ base.bias).detach())
    if variant == 1:  # a rotation and a scale of each pair
        gram = turn.T @ turn
        close(gram, torch.diag(gram.diagonal()))


# Updates


def change_of(spec: AdapterSpec) -> tuple[Tensor, dict[str, Tensor]]:
    weight, bias, base, values = weight_and_bias(spec)
    close(bias, base.bias.detach())
    return weight - base.weight.detach(), values


def test_hira_multiplies_the_weight() -> None:
    weight, _, base, v = weight_and_bias(Hira(rank=3))
    close(weight, (base.weight * (1 + v["B"] @ v["A"])).detach())
    low_rank_change = base.weight * (v["B"] @ v["A"])
    assert torch.linalg.matrix_rank(low_rank_change) > 3


def test_loha_is_a_product_by_elements() -> None:
    change, v = change_of(Loha(rank=2, alpha=6.0))
    close(change, 3.0 * (v["B1"] @ v["A1"]) * (v["B2"] @ v["A2"]))
    assert torch.linalg.matrix_rank(change) == 4


@pytest.mark.parametrize("factor", [-1, 2, 4, 5])
def test_lokr_is_a_kronecker_product(factor: int) -> None:
    change, v = change_of(Lokr(rank=2, alpha=3.0, factor=factor))
    close(change, 1.5 * torch.kron(v["C"], v["B"] @ v["A"]))
    parts = {-1: (4, 4), 2: (2, 2), 4: (4, 4), 5: (4, 4)}[factor]
    assert v["C"].shape == parts


@pytest.mark.parametrize("rank", [4, 5, IN])
def test_miss_repeats_one_matrix(rank: int) -> None:
    change, v = change_of(Miss(rank=rank))
    close(change, v["D"].repeat(1, IN)[:, :IN])


def test_c3a_has_the_gradient_that_peft_gets_wrong() -> None:
    """When this fails, peft is right: drop the exception in `conformance.py` and the remark in docs/adapters.md."""
    from peft.tuners.c3a.utils import BlockCircularConvolution

    bank, base, v = random_bank(C3a(block_size=4))
    x, weights = (torch.randn(5, size, dtype=torch.double) for size in (IN, OUT))
    x.requires_grad_()
    (ours,) = torch.autograd.grad(bank(x[None], base(x)[None]) - base(x), x, weights[None])
    theirs = BlockCircularConvolution.apply(x, v["w"]) / IN
    torch.testing.assert_close(theirs, bank(x[None], base(x)[None])[0] - base(x))
    (wrong,) = torch.autograd.grad(theirs, x, weights)
    close(ours, weights @ change_of(C3a(block_size=4))[0])
    assert not torch.allclose(wrong, ours, atol=1e-3)


@pytest.mark.parametrize("size", [1, 4, 8])
def test_c3a_has_circulant_blocks(size: int) -> None:
    change, v = change_of(C3a(block_size=size))
    for m in range(OUT // size):
        for n in range(IN // size):
            block = change[m * size : (m + 1) * size, n * size : (n + 1) * size]
            for i in range(size):
                close(block[i], v["w"][m, n].roll(i) / IN)


def test_gralora_has_a_grid_of_low_rank_blocks() -> None:
    change, v = change_of(Gralora(rank=2, alpha=8.0, blocks=4))
    rows = [torch.cat([v["B"][i, j] @ v["A"][i, j] for j in range(4)], 1) for i in range(4)]
    close(change, torch.cat(rows) * 8.0 / (4 * 2))
    assert torch.linalg.matrix_rank(change) > 4 * 2


def test_delora_is_bounded_by_its_strength() -> None:
    spec = Delora(rank=3)
    change, v = change_of(spec)
    one = sum(torch.outer(v["B"][:, i], v["A"][i]) / (v["B"][:, i].norm() * v["A"][i].norm()) for i in range(spec.rank))
    close(change, v["lambda"] / spec.rank * one * v["n"])
    assert (change / v["n"]).norm() <= v["lambda"].abs()
    bank, base, _ = random_bank(spec)
    with torch.no_grad():
        x = torch.randn(5, IN, dtype=torch.double)
        before = output(bank, base, x)
        bank.values["A"].mul_(7.0)
        close(output(bank, base, x), before)


def test_delora_measures_the_columns_of_the_weight() -> None:
    base = nn.Linear(IN, OUT)
    spec = Delora(rank=2)
    torch.testing.assert_close(Bank(SITE, [spec], base, [0]).of_slot(0)["n"], base.weight.detach().norm(dim=0))
    assert not spec.parameters(SITE)["n"].trainable


def test_flora_has_a_core() -> None:
    change, v = change_of(Flora(rank=3, scale=2.0))
    close(change, 2.0 * v["B"] @ v["G"] @ v["A"])


def test_frozen_factors_of_flora_come_from_their_key() -> None:
    spec = Flora(rank=3, factors="frozen", factors_key=5)
    assert spec.num_params(SITE) == 9
    assert spec.stored_bits(SITE) == 9 * 32
    base = nn.Linear(IN, OUT)
    one, two = (Bank(SITE, [spec], base, [seed]).of_slot(0) for seed in (1, 2))
    assert torch.equal(one["A"], two["A"])
    other = Bank(SITE, [Flora(rank=3, factors="frozen", factors_key=6)], base, [1]).of_slot(0)
    assert not torch.equal(one["A"], other["A"])
    trained = Flora(rank=3, factors_key=5)
    assert trained.canonical() == Flora(rank=3)
    assert spec.canonical() == spec
    assert trained.num_params(SITE) == 9 + 3 * (IN + OUT)


def test_hydra_has_a_branch_beside_and_one_after() -> None:
    weight, bias, base, v = weight_and_bias(Hydra(rank=3, alpha=6.0))
    after = torch.eye(OUT, dtype=torch.double) + 2.0 * v["D"] @ v["C"]
    close(weight, (after @ base.weight + 2.0 * v["B"] @ v["A"]).detach())
    close(bias, base.bias.detach())


def test_multilora_is_a_sum_of_branches_with_a_scale_for_each_output() -> None:
    weight, bias, base, v = weight_and_bias(MultiLora(rank=3, alpha=6.0, branches=2))
    changes = [2.0 * torch.diag(v["s"][i]) @ v["B"][i] @ v["A"][i] for i in range(2)]
    close(weight, base.weight.detach() + changes[0] + changes[1])
    close(bias, base.bias.detach())


def test_multilora_starts_with_its_scales_alone_at_zero() -> None:
    spec = MultiLora(rank=3)
    values = Bank(SITE, [spec], nn.Linear(IN, OUT), [1]).of_slot(0)
    assert not values["s"].any()
    assert values["A"].any()
    assert values["A"].abs().max() <= IN**-0.5
    assert 0.0 < values["B"].abs().max() <= 3**-0.5
    assert not torch.equal(values["A"][0], values["A"][1])
    assert spec.num_params(SITE) == 3 * (3 * (IN + OUT) + OUT)


def test_adapterbias_shifts_by_the_token() -> None:
    bank, base, v = random_bank(AdapterBias())
    x = torch.randn(5, IN, dtype=torch.double)
    y = base(x).detach()
    shift = output(bank, base, x) - y
    close(shift, torch.stack([(v["a"] @ token) * v["v"] for token in y]))
    assert torch.linalg.matrix_rank(shift) == 1


# Sizes


def test_block_sizes_are_divisors() -> None:
    assert divisors(24) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert divisors(25) == [1, 5, 25]
    assert nearest_divisor(24, 7) == 6  # of 6 and 8, as peft
    assert nearest_divisor(24, 1000) == 24
    assert nearest_divisor(24, 3, 2) == 2
    assert nearest_divisor(17, 2) == 17
    assert nearest_divisor(15, 4, 2) == 0


def test_oft_has_the_block_size_of_peft() -> None:
    from peft import OFTConfig
    from peft.tuners.oft.layer import Linear as Theirs

    for width in (12, 24, 40, 100, 768):
        for wanted in (2, 5, 7, 16, 32):
            config = OFTConfig(oft_block_size=wanted)
            with pytest.warns() if width % wanted or wanted > width else nullcontext():
                module = Theirs(nn.Linear(width, 2), "default", config, r=0)
            site = replace(SITE, in_features=width)
            assert Oft(block_size=wanted).block(site) == module.oft_block_size["default"]


@pytest.mark.parametrize(
    ("spec", "odd", "fits"),
    [
        (Road(), {"out_features": 15}, False),
        (Boft(factors=2), {"in_features": 15}, False),
        (Boft(factors=1), {"in_features": 15}, True),
        (Miss(rank=25), {}, False),
    ],
)
def test_layers_that_cannot_be_divided_do_not_fit(spec: AdapterSpec, odd: dict[str, int], fits: bool) -> None:
    site = replace(SITE, **odd)
    assert spec.fits(site) == fits
    assert spec.needs


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Oft, "block_size", 1),
        (Boft, "factors", 0),
        (Road, "variant", 3),
        (Lokr, "factor", 0),
        (C3a, "block_size", 0),
        (Hra, "pairs", 0),
        (Flora, "factors", "half"),
        (Gralora, "blocks", 0),
        (Hira, "init", "orthogonal"),
    ],
)
def test_bad_settings_are_refused(kind: type[AdapterSpec], field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        kind(**{field: value})  # type: ignore[arg-type]


# Together


@pytest.mark.parametrize("family", ["bert", "llama-causal", "gpt2"])
def test_all_at_one_site_merge_in_the_order_in_which_they_act(family: str) -> None:
    model, backbone = tiny(family)
    model.double()  # the outputs of so many types are large
    specs = (
        *(Ia3(), Hra(pairs=1), Oft(block_size=4), Oft(block_size=8), Boft(block_size=4), Road(group_size=4), Ssf()),
        *(Hydra(rank=2), Lora(rank=2), Lora(rank=3), Loha(rank=2), Lokr(rank=2), Miss(rank=3), Delora(rank=2)),
        *(C3a(block_size=4), Gralora(rank=1), Flora(rank=2), MultiLora(rank=2)),
        *(AdapterBias(), Hira(rank=2), Bitfit()),
    )
    sites = [site for site in backbone.sites if site.role in ("attn.v", "attn.qkv", "mlp.down")]
    architecture = Architecture.of({site.name: [spec for spec in specs if spec.fits(site)] for site in sites})
    with Attachment(model, backbone, [architecture], [1]) as attachment:
        attachment.double()
        attachment.load_state({name: v + 0.02 * torch.randn_like(v) for name, v in attachment.state().items()})
        attachment.eval()
        apart = model(tokens()).logits
        with attachment.merged(), attachment.bare():
            torch.testing.assert_close(model(tokens()).logits, apart, atol=1e-5, rtol=1e-5)


def test_one_adapter_at_most_computes_with_the_weight() -> None:
    model, backbone = tiny("bert")
    architecture = Architecture.of({"layers.0.attn.q": [Hira(rank=2), Lora(rank=2), Dora(rank=2)]})
    with pytest.raises(ValueError, match="dora and hira at"):
        Attachment(model, backbone, [architecture], [1])
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", ["bert", "llama-causal", "gpt2"])
def test_ia3_scales_any_linear(family: str) -> None:
    model, backbone = tiny(family)
    sites = [site for site in backbone.sites if site.role in LINEAR_ROLES]
    architecture = Architecture.of({site.name: [Ia3()] for site in sites})
    widths = [site.in_features if site.role == "mlp.down" else site.out_features for site in sites]
    assert architecture.num_params(backbone) == sum(widths)
    with Attachment(model, backbone, [architecture], [1], pretrained_head=True) as attachment:
        values = noisy(attachment)
        attachment.load_state(values)
        attachment.eval()
        apart = model(tokens()).logits
        with attachment.merged(), attachment.bare():
            torch.testing.assert_close(model(tokens()).logits, apart, atol=1e-5, rtol=1e-5)
