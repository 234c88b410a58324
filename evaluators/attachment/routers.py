"""The routers of an attachment: the batch that they read, their penalties, and records of their decisions."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.runtime.bank import Bank
from autopeft.search_space.runtime.tokens import Tokens


class Routers:
    """The routers of K slots on `model`, which has no hooks yet.

    `served`: banks, each with the slots that it serves (None: all); banks of mixtures have routers.
    """

    def __init__(self, num_slots: int, served: Sequence[tuple[Bank, Tensor | None]], model: nn.Module) -> None:
        self.num_slots = num_slots
        #: The model without its head: a task may run it alone, and the lower layers may be replaced.
        self.model: nn.Module = getattr(model, "base_model", model)
        #: The caller of the model sets `domains`.
        self.tokens = Tokens()
        self.served = [(bank, bank.router, slots) for bank, slots in served if bank.router is not None]
        for _, state, _ in self.served:
            state.tokens = self.tokens
        #: Names of the routers that need a first pass of the bare model.
        self.first_pass_routers = [
            r.name for bank, *_ in self.served if (r := bank.specs[0].routed_by) and r.first_pass
        ]
        self.bare = _bare(self.model) if self.first_pass_routers else None

    def __bool__(self) -> bool:
        return bool(self.served)

    def look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the batch before the model runs (a forward pre-hook): the same N texts for every slot, [K * N, T]."""
        ids = args[0] if args else kwargs.get("input_ids")
        shape = (kwargs["inputs_embeds"] if ids is None else ids).shape
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"routers need an attention mask [texts, tokens], got the shape {tuple(mask.shape)}")
        # With a key/value cache, the mask also has the columns of the earlier tokens.
        mask = None if mask is None else mask[: shape[0] // self.num_slots, -shape[1] :].bool()
        self.tokens.begin(shape[1], mask, lambda: self._first_pass(args, kwargs, shape[0]))

    @torch.no_grad()
    def _first_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Tensor:
        """Return the last hidden states [N, T, H] of the bare model, for the texts of one slot.

        Raises ValueError if the model reads only parts of the texts, as with a key/value cache.
        """
        assert self.bare is not None
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                f"the router {self.first_pass_routers[0]!r} needs whole texts: generate with use_cache=False"
            )

        def of_one_slot(value: Any) -> Any:
            packed = isinstance(value, Tensor) and value.dim() > 1 and len(value) == rows
            return value[: rows // self.num_slots] if packed else value

        named = {name: of_one_slot(value) for name, value in kwargs.items()}
        states: Tensor = self.bare(*map(of_one_slot, args), **named)[0]
        return states

    def penalised(self, losses: Tensor) -> Tensor:
        """Add the penalties of each slot's routers in the last forward pass to the losses [K]."""
        for _, state, slots in self.served:
            if state.last is None:
                continue
            penalty = state.last.penalty.to(losses)
            losses = losses + (penalty if slots is None else torch.zeros_like(losses).index_add(0, slots, penalty))
            state.last = None  # the graph of a step must not outlive the step
        self.tokens.end()
        return losses

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Weight all experts of every mixture equally within the block, instead of by their routers."""
        for _, state, _ in self.served:
            state.averaged = True
        try:
            yield
        finally:
            for _, state, _ in self.served:
                state.averaged = False

    def watch(self) -> None:
        """Start to record the decisions of the routers for `routes`, and discard earlier records."""
        for _, state, _ in self.served:
            state.seen = []

    def routes(self, k: int) -> dict[str, dict[str, Any]]:
        """Return statistics of the routers of slot k since `watch`, by site.

        `load`, `entropy` and `active` are as in `Routing`, as means over all routed tokens or texts.
        """
        found: dict[str, dict[str, Any]] = {}
        for key, bank, j in banks_of([bank for bank, *_ in self.served], k):
            seen = bank.router.seen if bank.router else None
            if not seen:
                continue
            count = torch.stack([routing.count for routing in seen]).float().cpu()
            share = count / count.sum()
            own = {
                name: torch.stack([getattr(routing, name)[j] for routing in seen]).movedim(0, -1).cpu() @ share
                for name in ("load", "entropy", "active")
            }
            own["load"] = own["load"][: bank.specs[j].num_experts]
            found[key] = {name: [round(v, 4) for v in t.flatten().tolist()] for name, t in own.items()}
        return found


def _bare(model: nn.Module) -> nn.Module:
    """Copy the modules of `model` in evaluation mode, with shared parameters and buffers.

    Hooks of one do not act in the other.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


def banks_of(banks: Sequence[Bank], k: int) -> Iterator[tuple[str, Bank, int]]:
    """Yield banks that serve slot k: a name that does not depend on the pack, the bank, the slot's index in it."""
    seen: dict[str, int] = {}
    for bank in banks:
        if k in bank.slots_served:
            key = f"{bank.site.name}/{bank.specs[0].kind}"
            seen[key] = seen.get(key, 0) + 1
            yield key if seen[key] == 1 else f"{key}#{seen[key]}", bank, bank.slots_served.index(k)


def check_routers(architecture: Architecture, backbone: Backbone) -> None:
    """Raise ValueError for a router that would reveal later tokens to a token of a causal model."""
    for name, spec in architecture:
        if backbone.causal and spec.routed_by and spec.routed_by.reads_ahead:
            raise ValueError(
                f"{name}: the router {spec.routed_by.name!r} reads later tokens, so it cannot be used in a causal model"
            )
