"""What every adapter type must pass: one row per kind, which `test_adapters.py` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.search_space.adapters import (
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
    Shira,
    Ssf,
    Vera,
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
    backbone's module) to peft's tensors, by the end of their names; shapes may differ in ones. `roles`: where
    peft can place it (default: the row's). `without`: families whose linears it does not know.
    """

    config: Callable[[Any, Sequence[Site]], Any]
    values: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]
    roles: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One adapter type.

    `specs`: settings to test, of different sizes where the type has a size. `peft`: the same in peft, or the
    reason why there is nothing to compare. `roles`: where the tests place it (default: the type's own
    default).
    """

    kind: str
    specs: tuple[AdapterSpec, ...]
    peft: Peft | str
    roles: tuple[str, ...] = ()

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
        kind="shira",
        specs=(Shira(rank=3), Shira(rank=5, scale=2.0), Shira(rank=1)),
        peft="peft draws other places, which an export takes along: see test_exporters.py",
        roles=_SOME_LINEARS,
    ),
)
