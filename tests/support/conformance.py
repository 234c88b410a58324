"""What every adapter type must pass: one row per kind, which `test_adapters.py` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.search_space.adapters import (
    AdapterBias,
    AdapterSpec,
    Beft,
    BiAdaptFormer,
    Bitfit,
    Boft,
    Bottleneck,
    C3a,
    Compacter,
    Delora,
    Dense,
    Dora,
    Eigenlorax,
    Flora,
    Full,
    Gralora,
    Hira,
    Hra,
    Hydra,
    Hyperformer,
    Ia3,
    Lily,
    Loha,
    Lokr,
    Lora,
    Miss,
    Mixture,
    Mos,
    MultiLora,
    Norm,
    Oft,
    Polyhistor,
    Prefix,
    Randlora,
    Road,
    Shira,
    SparseAdapter,
    Spiel,
    Ssf,
    Vblora,
    Vera,
    VlPet,
)
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Backbone, Site
from autopeft.testing.adapters import sites_of


@torch.no_grad()
def descend(attachment: Attachment) -> None:
    """A step of gradient descent."""
    for value, _ in attachment.trainable():
        if value.grad is not None:
            value.sub_(0.2 * value.grad)
            value.grad = None


@dataclass(frozen=True, kw_only=True)
class Peft:
    """How Hugging Face's peft says the same.

    `config`: (spec, adapted sites) to a peft configuration. `values`: (trained tensors of one adapter, the
    backbone's module) to peft's tensors, by the end of their names; shapes may differ in ones. Values of frozen
    tensors may be buffers in peft. `roles`: where peft can place it (default: the row's). `without`: families
    whose linears it does not know. `specs`: those of the row's that peft has (default: all). `gradients`: whether
    its gradients are right.
    """

    config: Callable[[Any, Sequence[Site]], Any]
    values: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]
    roles: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    specs: tuple[AdapterSpec, ...] | None = None
    gradients: bool = True


@dataclass(frozen=True, kw_only=True)
class Row:
    """One adapter type.

    `specs`: settings to test, of different sizes where the type has a size. `peft`: the same in peft, or the
    reason why there is nothing to compare. `roles`: where the tests place it (default: the type's own
    default). `straight_through`: its gradient is, by design, no derivative.
    """

    kind: str
    specs: tuple[AdapterSpec, ...]
    peft: Peft | str
    roles: tuple[str, ...] = ()
    straight_through: bool = False

    def sites(self, backbone: Backbone, roles: tuple[str, ...] = ()) -> list[Site]:
        """The sites of `roles` (default: the row's) that the type fits."""
        return sites_of(self.specs[0], backbone, roles or self.roles)

    def place(self, spec: AdapterSpec, backbone: Backbone, roles: tuple[str, ...] = ()) -> Architecture:
        """`spec` at each of `sites`."""
        return Architecture.of({site.name: [spec] for site in self.sites(backbone, roles)})


def _modules(sites: Sequence[Site]) -> list[str]:
    return [site.module for site in sites]


def _lora_config(spec: Lora, sites: Sequence[Site]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.scaling == "rslora",
        use_dora=spec.kind == "dora",
        target_modules=_modules(sites),
    )


def _ia3_config(spec: Ia3, sites: Sequence[Site]) -> Any:
    from peft import IA3Config

    inner = [site for site in sites if site.role == "mlp.down"]
    return IA3Config(target_modules=_modules(sites), feedforward_modules=_modules(inner))


def _norm_config(spec: Norm, sites: Sequence[Site]) -> Any:
    from peft import LNTuningConfig

    return LNTuningConfig(target_modules=_modules(sites))


def _bitfit_config(spec: Bitfit, sites: Sequence[Site]) -> Any:
    from peft import BeftConfig

    return BeftConfig(target_modules=_modules(sites))


def _lora_values(values: dict[str, Tensor], base: nn.Module) -> dict[str, Tensor]:
    names = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}
    return {f"{names[name]}.default.weight": value for name, value in values.items()}


def _ia3_values(values: dict[str, Tensor], base: nn.Module) -> dict[str, Tensor]:
    (scale,) = values.values()
    return {"ia3_l.default": scale}


def _norm_values(values: dict[str, Tensor], base: nn.Module) -> dict[str, Tensor]:
    return {f"ln_tuning_layers.default.{name}": getattr(base, name) + change for name, change in values.items()}


def _bitfit_values(values: dict[str, Tensor], base: nn.Module) -> dict[str, Tensor]:
    return {"beft_bias.default": values["b"]}


def _at(config: str, **arguments: Callable[[Any], object]) -> Callable[[Any, Sequence[Site]], Any]:
    """The configuration of this name at the sites, with arguments that are functions of the spec."""

    def make(spec: Any, sites: Sequence[Site]) -> Any:
        import peft

        own = {name: value(spec) for name, value in arguments.items()}
        return getattr(peft, config)(target_modules=_modules(sites), **own)

    return make


def _by_block(config: str, argument: str, **arguments: Callable[[Any], object]) -> Callable[[Any, Sequence[Site]], Any]:
    """As `_at`, with a block size that the sites have in common."""

    def make(spec: Any, sites: Sequence[Site]) -> Any:
        (size,) = {spec.block(site) for site in sites}
        return _at(config, **{argument: lambda spec: size}, **arguments)(spec, sites)

    return make


def _gralora_config(spec: Gralora, sites: Sequence[Site]) -> Any:
    from peft import GraloraConfig

    (blocks,) = {spec.grid(site.in_features, site.out_features) for site in sites}
    return GraloraConfig(target_modules=_modules(sites), r=blocks * spec.rank, gralora_k=blocks, alpha=spec.alpha)


def _road_config(spec: Road, sites: Sequence[Site]) -> Any:
    from peft import RoadConfig

    (group,) = {spec.group(site.out_features) for site in sites}
    return RoadConfig(target_modules=_modules(sites), variant=f"road_{spec.variant}", group_size=group)


def _named(**names: str) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]:
    """Our tensors under peft's names."""
    return lambda values, base: {names[name]: value for name, value in values.items()}


def _gralora_values(values: dict[str, Tensor], base: nn.Module) -> dict[str, Tensor]:
    a, b = values["A"], values["B"]  # [i, j, R, D_in / n] and [i, j, D_out / n, R]
    n, rank = len(a), a.shape[2]
    theirs_a = torch.stack([torch.cat([a[i, j].T for i in range(n)], 1) for j in range(n)])
    theirs_b = torch.stack([torch.cat([b[i, j].T for j in range(n)], 0) for i in range(n)])
    assert theirs_a.shape[2] == theirs_b.shape[1] == n * rank
    return {"gralora_A.default": theirs_a, "gralora_B.default": theirs_b}


_SOME_LINEARS = ("attn.q", "attn.v", "attn.qkv", "mlp.down")

ROWS: tuple[Row, ...] = (
    Row(
        kind="full",
        specs=(Full(),),
        peft="peft leaves training everything to the trainer",
    ),
    Row(
        kind="dora",
        specs=(
            Dora(rank=3, alpha=6.0, dropout=0.2),
            Dora(rank=5, alpha=4.0, scaling="rslora", init="gaussian"),
            Dora(rank=1, alpha=1.0),
        ),
        peft=Peft(config=_lora_config, values=_lora_values),
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="lora",
        specs=(
            Lora(rank=3, alpha=6.0, dropout=0.2),
            Lora(rank=5, alpha=4.0, scaling="rslora", dropout=0.3, init="gaussian"),
            Lora(rank=1, alpha=1.0, init="orthogonal"),
        ),
        peft=Peft(config=_lora_config, values=_lora_values),
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="norm",
        specs=(Norm(),),
        peft=Peft(config=_norm_config, values=_norm_values),
    ),
    Row(
        kind="bitfit",
        specs=(Bitfit(),),
        peft=Peft(config=_bitfit_config, values=_bitfit_values, roles=LINEAR_ROLES, without=("gpt2",)),
    ),
    Row(
        kind="oft",
        specs=(Oft(block_size=4), Oft(block_size=2), Oft(block_size=8)),
        peft=Peft(
            config=_by_block("OFTConfig", "oft_block_size", use_cayley_neumann=lambda spec: False),
            values=_named(Q="oft_R.default.weight"),
            without=("gpt2",),
        ),
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="boft",
        specs=(Boft(block_size=4), Boft(block_size=2, factors=3), Boft(block_size=4, factors=2)),
        peft=Peft(
            config=_by_block("BOFTConfig", "boft_block_size", boft_block_num=lambda spec: 0),
            values=_named(R="boft_R.default", s="boft_s.default"),
            without=("gpt2",),
            specs=(Boft(block_size=4),),  # for several factors it needs CUDA: see test_operators.py
        ),
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="hra",
        specs=(Hra(pairs=2), Hra(pairs=3), Hra(pairs=1)),
        peft=Peft(
            config=_at("HRAConfig", r=lambda spec: 2 * spec.pairs),
            values=_named(U="hra_u.default"),
            without=("gpt2",),
        ),
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="road",
        specs=(Road(group_size=4), Road(variant=2, group_size=4), Road(variant=4, group_size=2)),
        peft=Peft(
            config=_road_config,
            values=_named(theta="road_theta.default", alpha="road_alpha.default"),
            without=("gpt2",),
        ),
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="hira",
        specs=(Hira(rank=3, dropout=0.2), Hira(rank=5, init="gaussian"), Hira(rank=1)),
        peft=Peft(
            config=_at("HiraConfig", r=lambda spec: spec.rank),
            values=_named(A="hira_A.default", B="hira_B.default"),
        ),
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="loha",
        specs=(Loha(rank=3, alpha=6.0), Loha(rank=5), Loha(rank=1)),
        peft=Peft(
            config=_at("LoHaConfig", r=lambda spec: spec.rank, alpha=lambda spec: spec.alpha),
            values=_named(
                B1="hada_w1_a.default", A1="hada_w1_b.default", B2="hada_w2_a.default", A2="hada_w2_b.default"
            ),
            without=("gpt2",),
        ),
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="lokr",
        specs=(Lokr(rank=2, alpha=6.0, factor=2), Lokr(rank=1, factor=2), Lokr(rank=2), Lokr(rank=3)),
        peft=Peft(
            config=_at(
                "LoKrConfig",
                r=lambda spec: spec.rank,
                alpha=lambda spec: spec.alpha,
                decompose_factor=lambda spec: spec.factor,
            ),
            values=_named(C="lokr_w1.default", B="lokr_w2_a.default", A="lokr_w2_b.default"),
            without=("gpt2",),
            specs=(Lokr(rank=2, alpha=6.0, factor=2), Lokr(rank=1, factor=2)),  # larger ranks: a whole matrix
        ),
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="miss",
        specs=(Miss(rank=3, dropout=0.2), Miss(rank=5), Miss(rank=7), Miss(rank=8)),
        peft=Peft(
            config=_at("MissConfig", r=lambda spec: spec.rank),
            values=lambda values, base: {"miss_block.default": values["D"].T},
            without=("gpt2",),
        ),
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="c3a",
        specs=(C3a(block_size=4), C3a(block_size=8), C3a(block_size=1)),
        peft=Peft(
            config=_by_block("C3AConfig", "block_size"),
            values=_named(w="c3a_kernel.default"),
            roles=("attn.q", "mlp.down"),
            without=("gpt2",),
            gradients=False,  # those of lower layers: see test_operators.py
        ),
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="gralora",
        specs=(Gralora(rank=2, dropout=0.2), Gralora(rank=3, alpha=8.0), Gralora(rank=1, blocks=4)),
        peft=Peft(config=_gralora_config, values=_gralora_values),
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="delora",
        specs=(Delora(rank=3, strength=3.0, dropout=0.2), Delora(rank=5, strength=4.0), Delora(rank=1, strength=1.0)),
        peft=Peft(
            config=_at("DeloraConfig", r=lambda spec: spec.rank, delora_lambda=lambda spec: spec.strength),
            values=_named(
                A="delora_A.default",
                B="delora_B.default",
                **{"lambda": "delora_lambda.default"},
                n="delora_w_norm.default",
            ),
            without=("gpt2",),
        ),
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="flora",
        specs=(
            Flora(rank=3, dropout=0.2),
            Flora(rank=5, scale=2.0),
            Flora(rank=2, factors="frozen", factors_key=3),
            Flora(rank=4, factors="frozen"),
            Flora(rank=3, factors="svd"),
        ),
        peft="peft has no FLoRA: see test_operators.py",
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="hydra",
        specs=(Hydra(rank=3, alpha=3.0), Hydra(rank=5, alpha=4.0), Hydra(rank=1, alpha=1.0)),
        peft="peft has no Hydra: see test_operators.py",
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="multilora",
        specs=(MultiLora(rank=3, dropout=0.2), MultiLora(rank=1, alpha=4.0), MultiLora(rank=2, branches=2)),
        peft="peft has no MultiLoRA: see test_operators.py",
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="adapterbias",
        specs=(AdapterBias(),),
        peft="peft has no AdapterBias: see test_operators.py",
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="beft",
        specs=(Beft(),),
        peft=Peft(config=_bitfit_config, values=_bitfit_values, without=("gpt2",)),
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="ssf",
        specs=(Ssf(),),
        peft="peft has no SSF",
    ),
    Row(
        kind="ia3",
        specs=(Ia3(),),
        peft=Peft(config=_ia3_config, values=_ia3_values),
    ),
    Row(
        kind="bottleneck",
        specs=(
            Bottleneck(size=4, init="kaiming", dropout=0.2),
            Bottleneck(size=1, scale=3.0, dropout=0.1),
            Bottleneck(size=3, form="parallel", activation="gelu", scale=4.0),
            Bottleneck(size=2, form="parallel", activation="gelu", init="houlsby"),
        ),
        peft="peft has no bottleneck adapters",
        roles=("attn", "mlp"),
    ),
    Row(
        kind="biadaptformer",
        specs=(
            BiAdaptFormer(size=4, dropout=0.2),
            BiAdaptFormer(size=1, scale=3.0),
            BiAdaptFormer(size=3, form="serial", activation="gelu"),
        ),
        peft="peft has no bottleneck adapters",
        straight_through=True,
    ),
    Row(
        kind="compacter",
        specs=(
            Compacter(size=2, blocks=2, dropout=0.2),
            Compacter(size=1, blocks=2, scale=2.0),
            Compacter(size=3, blocks=4, rank=2, form="parallel", activation="tanh"),
        ),
        peft="peft has no Compacter: see test_made_bottlenecks.py",
    ),
    Row(
        kind="hyperformer",
        specs=(
            Hyperformer(size=4, embedding=3, dropout=0.2),
            Hyperformer(size=2, embedding=3, scale=2.0),
            Hyperformer(size=3, embedding=5, form="parallel", activation="tanh"),
        ),
        peft="peft has no HyperFormer: see test_made_bottlenecks.py",
    ),
    Row(
        kind="polyhistor",
        specs=(
            Polyhistor(size=2, blocks=2, rank=2, embedding=3, dropout=0.2),
            Polyhistor(size=1, blocks=2, rank=2, embedding=3, scale=2.0),
            Polyhistor(size=3, blocks=4, rank=1, embedding=2, form="parallel", activation="tanh"),
        ),
        peft="peft has no Polyhistor: see test_made_bottlenecks.py",
    ),
    Row(
        kind="vlpet",
        specs=(
            VlPet(size=3, dropout=0.2),
            VlPet(size=2, granularity="token", form="parallel", activation="tanh"),
            VlPet(size=4, granularity="both", dropout=0.2),
            VlPet(size=2, granularity="both", scale=2.0),
        ),
        peft="peft has no VL-PET: see test_made_bottlenecks.py",
    ),
    Row(
        kind="prefix",
        specs=(Prefix(length=3), Prefix(length=1, init="normal"), Prefix(length=5, init="zeros")),
        peft="peft keeps the prefixes of all layers in one tensor and shifts positions: see test_prefix.py",
    ),
    Row(
        kind="mixture",
        specs=(
            Mixture(expert=Lora(rank=2, dropout=0.2), experts=4, shared_experts=1, router_noise=0.3),
            Mixture(expert=Lora(rank=3), experts=2, shared_experts=1, top_k=1),
            Mixture(expert=Lora(rank=1, alpha=1.0), experts=8, router="sigmoid", top_k=3),
            Mixture(expert=Lora(rank=2), experts=3, router="uniform"),
            Mixture(expert=Lora(dropout=0.2, scaling="rslora"), experts=2, shared_experts=1, ranks=(1, 4, 2), top_k=1),
        ),
        peft="peft's X-LoRA mixes adapters that are given; routers are compared token by token in test_mixture.py",
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="vera",
        specs=(Vera(rank=3, dropout=0.2), Vera(rank=6, d_initial=0.5), Vera(rank=1)),
        peft="peft draws other matrices, which an export takes along: see test_exporters.py",
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="randlora",
        specs=(Randlora(rank=8, alpha=16.0, dropout=0.2), Randlora(rank=5, alpha=10.0), Randlora(rank=8, alpha=4.0)),
        peft="peft draws other matrices: see test_shared_factors.py",
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="vblora",
        specs=(
            Vblora(rank=2, vectors=9, vector_length=4, dropout=0.2),
            Vblora(rank=3, vectors=9, vector_length=4),
            Vblora(rank=1, vectors=6, vector_length=6, top_k=3),
        ),
        peft="peft has the bank beside the modules: see test_shared_factors.py",
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="mos",
        specs=(
            Mos(rank=3, pool=5, dropout=0.2),
            Mos(rank=5, pool=5, scale=0.5),
            Mos(rank=2, pool=4, shards=2, private_rank=2),
        ),
        peft="peft has no MoS: see test_shared_factors.py",
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="lily",
        specs=(Lily(rank=3, expansions=2), Lily(rank=5, expansions=2, scale=2.0), Lily(rank=2, expansions=3)),
        peft="peft averages the gates over a batch: see test_shared_factors.py",
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="eigenlorax",
        specs=(
            Eigenlorax(rank=3, components=6, dropout=0.2),
            Eigenlorax(rank=5, components=6, scale=0.5),
            Eigenlorax(rank=2, components=4),
        ),
        peft="peft has no EigenLoRAx: see test_shared_factors.py",
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="sparseadapter",
        specs=(
            SparseAdapter(size=6, init="kaiming", dropout=0.2),
            SparseAdapter(size=3, form="parallel", init="kaiming", density=0.5, scale=4.0),
            SparseAdapter(size=4, init="kaiming", activation="silu"),
        ),
        peft="peft has no bottleneck adapters",
    ),
    Row(
        kind="dense",
        specs=(Dense(),),
        peft="peft saves whole modules with any adapter (modules_to_save), without a type of their own",
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="shira",
        specs=(Shira(rank=3), Shira(rank=5, scale=2.0), Shira(rank=1), Shira(rank=2, places="magnitude")),
        peft="peft draws other places, which an export takes along: see test_exporters.py",
        roles=_SOME_LINEARS,
    ),
    Row(
        kind="spiel",
        specs=(Spiel(rank=3, every=6, window=2), Spiel(rank=5, scale=2.0, every=4, window=4), Spiel(rank=1)),
        peft="peft has no sparse adapters whose places move; an export is its SHiRA: see test_exporters.py",
        roles=_SOME_LINEARS,
    ),
)


#: Types that compute in packs in ways of their own: by kernels, between sublayers, in attention, shared, or by scales.
QUICK_KINDS = ("lora", "bottleneck", "prefix", "vera", "ia3")


def kinds(*without: str) -> list[Any]:
    """Return the types of the rows but these, for tests that train each of them.

    All but `QUICK_KINDS` are slow tests there: what `test_adapters.py` tests of their formulas is most of it.
    """
    return [
        pytest.param(row.kind, marks=[pytest.mark.slow] * (row.kind not in QUICK_KINDS))
        for row in ROWS
        if row.kind not in without
    ]
