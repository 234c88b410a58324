"""The routers of an attachment: the batch that they read, what they add to the losses, and what they did."""

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

    `served`: banks, each with the slots that it serves (None: all of them); those of mixtures have routers.
    """

    def __init__(self, num_slots: int, served: Sequence[tuple[Bank, Tensor | None]], model: nn.Module) -> None:
        self.num_slots = num_slots
        #: The layers' own model: a task may run that without the head, and the lower layers may be replaced.
        self.model: nn.Module = getattr(model, "base_model", model)
        #: `domains` is for whoever calls the model to set.
        self.tokens = Tokens()
        self.served = [(bank, bank.router, slots) for bank, slots in served if bank.router is not None]
        for _, state, _ in self.served:
            state.tokens = self.tokens
        #: Names of the routers that ask for a first pass.
        self.asking = [r.name for bank, *_ in self.served if (r := bank.specs[0].routed_by) and r.first_pass]
        self.bare = _bare(self.model) if self.asking else None

    def __bool__(self) -> bool:
        return bool(self.served)

    def look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the batch ahead of the model, as a hook: it has the same N texts for every slot, [K * N, T]."""
        ids = args[0] if args else kwargs.get("input_ids")
        shape = (kwargs["inputs_embeds"] if ids is None else ids).shape
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"routers need an attention mask of texts and tokens, not of shape {tuple(mask.shape)}")
        # Where keys and values are cached, the mask has the columns of the tokens before these, too.
        mask = None if mask is None else mask[: shape[0] // self.num_slots, -shape[1] :].bool()
        self.tokens.begin(shape[1], mask, lambda: self._first_pass(args, kwargs, shape[0]))

    @torch.no_grad()
    def _first_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Tensor:
        """Return the last hidden states [N, T, H] of the bare model, for the texts of one slot.

        Raises ValueError where the model does not read the whole texts.
        """
        assert self.bare is not None
        if kwargs.get("past_key_values") is not None:
            raise ValueError(f"the router {self.asking[0]!r} needs whole texts: generate with use_cache=False")

        def of_one_slot(value: Any) -> Any:
            packed = isinstance(value, Tensor) and value.dim() > 1 and len(value) == rows
            return value[: rows // self.num_slots] if packed else value

        named = {name: of_one_slot(value) for name, value in kwargs.items()}
        states: Tensor = self.bare(*map(of_one_slot, args), **named)[0]
        return states

    def penalised(self, losses: Tensor) -> Tensor:
        """Return the losses [K] of the last forward pass with what the routers of each slot add to them."""
        for _, state, slots in self.served:
            if state.last is None:
                continue
            penalty = state.last.penalty.to(losses)
            losses = losses + (penalty if slots is None else torch.zeros_like(losses).index_add(0, slots, penalty))
            state.last = None  # the graph of a step must not outlive it
        self.tokens.end()
        return losses

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Weigh all experts of every mixture alike, whatever its router says."""
        for _, state, _ in self.served:
            state.averaged = True
        try:
            yield
        finally:
            for _, state, _ in self.served:
                state.averaged = False

    def watch(self) -> None:
        """Collect what the routers do from here on, for `routes`; forget what was collected before."""
        for _, state, _ in self.served:
            state.seen = []

    def routes(self, k: int) -> dict[str, dict[str, Any]]:
        """Return what the routers of slot k did since `watch`, by site.

        `load`, `entropy` and `active` are as in `Routing`, means over all that was routed.
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
    """Return the modules of `model` once more, in evaluation mode, with the same parameters and buffers.

    What is hooked to the one does not act in the other.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


def banks_of(banks: Sequence[Bank], k: int) -> Iterator[tuple[str, Bank, int]]:
    """Yield banks that serve slot k: a name that is the same in any pack, the bank, the slot's place in it."""
    seen: dict[str, int] = {}
    for bank in banks:
        if k in bank.slots_served:
            key = f"{bank.site.name}/{bank.specs[0].kind}"
            seen[key] = seen.get(key, 0) + 1
            yield key if seen[key] == 1 else f"{key}#{seen[key]}", bank, bank.slots_served.index(k)


def check_routers(architecture: Architecture, backbone: Backbone) -> None:
    """Raise ValueError for a router that would tell a causal model's token what comes after it."""
    for name, spec in architecture:
        if backbone.causal and spec.routed_by and spec.routed_by.reads_ahead:
            raise ValueError(f"{name}: the router {spec.routed_by.name!r} looks ahead, which a causal model must not")
