"""Mixtures for tests: banks with values as after training, and references that are written out token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.search_space import AdapterChoice, Architecture, Choice, SearchSpace
from autopeft.search_space.adapters import (
    AdapterSpec,
    Bottleneck,
    Dora,
    Ia3,
    Lora,
    Mixture,
)
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.call import Values
from autopeft.search_space.routers import ROUTERS, Router
from autopeft.search_space.runtime.bank import Bank, Call
from autopeft.search_space.runtime.tokens import Tokens
from autopeft.testing.models import tiny, tokens

from .router_conformance import gates_of, softmax
from .spaces import SMALL

WIDTH, OUT, TEXTS, LENGTH = 6, 6, 3, 4
LINEAR = Site(
    name="q",
    layer=0,
    role="attn.q",
    module="q",
    in_features=WIDTH,
    out_features=OUT,
    input_module="q",
    bias=True,
    hidden_size=5,
)
DOWN = replace(LINEAR, role="mlp.down")
SUBLAYER = replace(LINEAR, role="mlp")
EXPERTS: dict[str, tuple[AdapterSpec, Site]] = {
    "lora": (Lora(rank=2, alpha=3.0), LINEAR),
    "lora of rank 1": (Lora(rank=1, alpha=1.0), LINEAR),
    "dora": (Dora(rank=2), LINEAR),
    "ia3": (Ia3(), replace(LINEAR, role="attn.v")),
    "ia3 at the input": (Ia3(), DOWN),
    "serial": (Bottleneck(size=3, init="kaiming"), SUBLAYER),
    "parallel": (Bottleneck(size=2, form="parallel", activation="gelu", scale=2.0), SUBLAYER),
}
SETTINGS = {
    "token": {"top_k": 2},
    "switch": {"router": "token", "top_k": 1},
    "token, top_p": {"router": "token", "top_k": 4, "top_p": 0.6},
    "shared": {"router": "token", "top_k": 2, "shared_experts": 2},
    "sigmoid": {"top_k": 2},
    "sequence": {"top_k": 2},
    "task": {"top_k": 3, "tasks": 3},
    "soft": {},
    "uniform": {},
}


def mixture(expert: AdapterSpec, name: str, experts: int = 4, **fields) -> Mixture:
    own = {"router": name.split(",")[0] if name.split(",")[0] in ROUTERS else "token", **SETTINGS[name], **fields}
    return Mixture(expert=expert, experts=experts, **own)


def bank_of(specs: list[Mixture], site: Site, masked: bool = True, seed: int = 0) -> Bank:
    """A bank with values away from those of the start, and a minibatch with all that routers may ask for."""
    torch.manual_seed(0)
    # The values of LoRAs that are given are made up here, too: their folders need not exist.
    bank = Bank(site, specs, nn.Linear(WIDTH, OUT), [seed + k for k in range(len(specs))], draw=not specs[0].given)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in bank.values.values():
            value.add_(0.7 * torch.randn(value.shape[1:], generator=generator))
    mask = torch.ones(TEXTS, LENGTH, dtype=torch.bool)
    if masked:
        mask[1, 2:] = False
    states = torch.randn(TEXTS, LENGTH, site.hidden_size, generator=generator, dtype=torch.float64)
    assert bank.router is not None
    bank.router.tokens = Tokens(length=LENGTH, mask=mask, domains=torch.tensor([2, 0, 1]), first_pass=lambda: states)
    if specs[0].routed_by.follows:
        bank.router.tokens.lead(*leading(specs, site))
    return bank.double().eval()


def leading(specs: list[Mixture], site: Site) -> tuple[Bank, Tensor]:
    """The bank at the site that `specs` follow, and its gates [K, M, E]."""
    leaders = [replace(spec, router="token", leader="") for spec in specs]
    bank = Bank(replace(site, name=specs[0].leader_site), leaders, nn.Linear(WIDTH, OUT), range(len(specs)))
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(TEXTS * LENGTH, 8, generator=generator, dtype=torch.float64)
    owned = torch.stack([z.masked_fill(torch.arange(z.shape[1]) >= spec.experts, -torch.inf) for spec in specs])
    return bank, owned.softmax(-1)


def batch(slots: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(slots, TEXTS * LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.randn(slots, TEXTS * LENGTH, OUT, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), y.requires_grad_()


def expert_of(spec: Mixture, p: dict[str, Tensor], e: int) -> dict[str, Tensor]:
    """The parameters of expert e alone."""
    if spec.ranks:
        own = slice(sum(spec.ranks[:e]), sum(spec.ranks[: e + 1]))
        return {"A": p["A"][own], "B": p["B"][:, own]}
    return {name: value[e] for name, value in p.items() if not name.startswith("router")}


def alone(spec: Mixture, bank: Bank, p: dict[str, Tensor], e: int, x: Tensor, y: Tensor) -> Tensor:
    """What expert e of slot 0 makes of tokens [n, D]: its change of y, or of x."""
    one = Bank(bank.site, [spec.each[e]], bank.base[0], [0]).double().eval()
    values = {name: value[None] for name, value in expert_of(spec, p, e).items()}
    if spec.expert.implements("apply_input", bank.site):
        return (spec.expert.apply_input(values, x[None], one.call) - x)[0]
    return (spec.expert.apply(values, x[None], y[None], one.call) - y)[0]


def reference(spec: Mixture, bank: Bank, k: int, x: Tensor, y: Tensor) -> Tensor:
    """Slot k's tokens, one after the other. x: [M, D_in], y: [M, D_out]."""
    p = bank.of_slot(k)
    if spec.router == "soft":
        return _soft_reference(spec, bank, p, x, y)
    acting = x if spec.expert.implements("apply_input", bank.site) else y
    out = []
    for m in range(len(x)):
        token = acting[m]
        for e, gate in enumerate([1.0] * spec.shared_experts + gates_of(spec, p, bank.router.tokens, x, m)):
            if isinstance(gate, Tensor) or gate:
                token = token + gate * alone(spec, bank, p, e, x[m : m + 1], y[m : m + 1])[0]
        out.append(token)
    return torch.stack(out)


def _soft_reference(spec: Mixture, bank: Bank, p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    acting = x if spec.expert.implements("apply_input", bank.site) else y
    out = []
    for n in range(TEXTS):
        here = [n * LENGTH + t for t in range(LENGTH)]
        real = [m for m in here if bank.router.tokens.mask[n, m - here[0]]]
        added = []
        for e in range(spec.experts):
            shares = softmax([p["router"][e] @ x[m] for m in real])
            mean_x = sum(share * x[m] for share, m in zip(shares, real, strict=True))
            mean_y = sum(share * y[m] for share, m in zip(shares, real, strict=True))
            added.append(alone(spec, bank, p, e, mean_x[None], mean_y[None])[0])
        for m in here:
            gates = softmax([p["router"][e] @ x[m] for e in range(spec.experts)])
            out.append(acting[m] + sum(gate * change for gate, change in zip(gates, added, strict=True)))
    return torch.stack(out)


def forward(bank: Bank, x: Tensor, y: Tensor) -> Tensor:
    acts = bank.specs[0].implements("apply_input", bank.site)
    return bank.apply_input(x) if acts else bank(x, y)


def check_reference(
    bank: Bank, specs: list[Mixture], x: Tensor, y: Tensor, found: Tensor, tolerance: float = 1e-7
) -> None:
    """Outputs and gradients of a bank are those of its tokens one by one."""
    expected = torch.stack([reference(s, bank, k, x[k], y[k]) for k, s in enumerate(specs)])
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=found.dtype)
    wanted = [x, y, *(value for value in bank.values.values() if value.requires_grad)]
    grads = [
        torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True, materialize_grads=True)
        for out in (found, expected)
    ]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def load_moved(attachment: Attachment, k: int = 0) -> None:
    """Values of a slot away from those of the start."""
    generator = torch.Generator().manual_seed(4)
    state = {name: v + 0.3 * torch.randn(v.shape, generator=generator) for name, v in attachment.state(k).items()}
    attachment.load_state(state, k)


def gates_in(model: nn.Module, backbone: Backbone, architecture: Architecture) -> dict[tuple[str, AdapterSpec], Tensor]:
    """Of a forward pass, by site and mixture."""
    found: dict[tuple[str, AdapterSpec], Tensor] = {}
    gates_of = Router.gates

    def seen(router: Router, spec: Mixture, p: Values, x: Tensor, call: Call) -> Tensor:
        gates = found[call.bank.site.name, spec] = gates_of(router, spec, p, x, call)
        return gates

    with Attachment(model, backbone, [architecture], [0]) as attachment, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, "gates", seen)
        attachment.eval()
        load_moved(attachment)
        model(tokens())
    return found


def space(**fields) -> SearchSpace:
    own = {"rank": Choice.of([1, 2]), "experts": Choice.of([0, 2, 4]), "top_k": Choice.of([1, 4]), **fields}
    lora = AdapterChoice(kind="lora", at=("attn.q", "attn.v"), fields=own, vary={"experts": "layer"})
    return SearchSpace(backbone=SMALL, adapters={"lora": lora})


def shared_router(**fields) -> SearchSpace:
    own = {"rank": 2, "experts": Choice.of([2, 4]), "balance": 0.05, **fields}
    lora = AdapterChoice(
        kind="lora", at=("attn.q", "attn.v", "mlp.up"), fields=own, vary={"experts": "layer"}, router_per="layer"
    )
    return SearchSpace(backbone=tiny("bert")[1], adapters={"lora": lora})
