"""What every router must pass: one row per name, which `test_routers.py` runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autopeft.search_space.adapters import AdapterSpec, Lora, Mixture
from autopeft.search_space.routers import ROUTERS
from autopeft.search_space.runtime.tokens import Tokens

#: (values of a slot, the minibatch, x: [M, D_in], a token) to z of each expert.
Logits = Callable[[dict[str, Tensor], Tokens, Tensor, int], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class RouterRow:
    """One router.

    `logits`: its z for one token, written out, or the reason why there is none. `fields`: what a mixture with it says
    beside its number of experts. `smaller`: fields of another mixture in the same pack.
    """

    name: str
    logits: Logits | str
    fields: Mapping[str, Any] = field(default_factory=dict)
    smaller: Mapping[str, Any] = field(default_factory=lambda: {"experts": 3, "top_k": 1})

    def mixture(self, expert: AdapterSpec | None = None, *, experts: int = 4, **fields: Any) -> Mixture:
        """A mixture with this router, and what the router cannot do without."""
        router, own = ROUTERS[self.name], dict(self.fields)
        if router.between_given:
            own["given"] = tuple(f"folder {e}" for e in range(experts))
        if router.needs_domains:
            own["tasks"] = 3
        if router.follows:
            own["leader"] = "leader"
        return Mixture(expert=expert or Lora(rank=2), router=self.name, experts=experts, **{**own, **fields})

    def pack(self) -> list[Mixture]:
        """Mixtures of one structure."""
        return [self.mixture().canonical(), self.mixture(**self.smaller).canonical()]


def of_token(p: dict[str, Tensor], batch: Tokens, x: Tensor, m: int) -> list[Tensor]:
    return [row @ x[m] for row in p["router"]]


def of_text(p: dict[str, Tensor], batch: Tokens, x: Tensor, m: int) -> list[Tensor]:
    assert batch.mask is not None
    n = m // batch.length
    text = [x[n * batch.length + t] for t in range(batch.length) if batch.mask[n, t]]
    return [row @ (sum(text) / len(text)) for row in p["router"]]


def of_domain(p: dict[str, Tensor], batch: Tokens, x: Tensor, m: int) -> list[Tensor]:
    assert batch.domains is not None
    return [row[batch.domains[m // batch.length]] for row in p["router"]]


def of_directions(p: dict[str, Tensor], batch: Tokens, x: Tensor, m: int) -> list[Tensor]:
    rights = [torch.linalg.svd(b @ a)[2] for a, b in zip(p["A"], p["B"], strict=True)]
    return [(right[0] @ x[m]).abs() for right in rights]


def of_hidden_states(p: dict[str, Tensor], batch: Tokens, x: Tensor, m: int) -> list[Tensor]:
    h = batch.hidden_states()[m // batch.length, m % batch.length]
    return [row @ h + bias for row, bias in zip(p["router"], p["router_bias"], strict=True)]


def softmax(z: list[Tensor]) -> list[Tensor]:
    total = sum(math.e**v for v in z)
    return [math.e**v / total for v in z]


def gates_of(spec: Mixture, p: dict[str, Tensor], batch: Tokens, x: Tensor, m: int) -> list[Any]:
    """The gates of token m, without the shared experts'."""
    logits = ROWS[spec.router].logits
    if isinstance(logits, str):
        assert spec.routed_by.constant, logits
        return [1 / spec.experts] * spec.experts
    z = logits(p, batch, x, m)
    if not spec.routed_by.chooses:
        return softmax(z)
    sigmoid = spec.router == "sigmoid"
    weights = [1 / (1 + math.e**-v) for v in z] if sigmoid else softmax(z)
    order = [w + p["router_bias"][e] for e, w in enumerate(weights)] if sigmoid else weights
    best = sorted(range(spec.experts), key=lambda e: -order[e].item())[: spec.top_k]
    total = sum(w.item() for w in weights)
    kept, reached = [], 0.0
    for e in best:
        if reached < spec.top_p:
            kept.append(e)
            reached += weights[e].item() / total
    scale = 1.0 if len(kept) == 1 else sum(weights[e] for e in kept)
    return [weights[e] / scale if e in kept else 0.0 for e in range(spec.experts)]


ROWS: dict[str, RouterRow] = {
    row.name: row
    for row in (
        RouterRow(name="token", logits=of_token),
        RouterRow(name="sigmoid", logits=of_token),
        RouterRow(name="sequence", logits=of_text),
        RouterRow(name="task", logits=of_domain),
        RouterRow(name="poly", logits="it mixes parameters: see test_mixture.py", fields={"heads": 2}),
        RouterRow(name="soft", logits="experts see means of a text: see test_mixture.py"),
        RouterRow(name="arrow", logits=of_directions, smaller={"top_k": 1}),
        RouterRow(name="xlora", logits=of_hidden_states, smaller={"router_noise": 0.1}),
        RouterRow(name="uniform", logits="all gates are equal"),
        RouterRow(name="follow", logits="its gates are the leader's: see test_mixture_leaders.py"),
    )
}
