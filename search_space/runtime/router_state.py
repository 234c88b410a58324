"""The state of a mixture's router at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.runtime.tokens import Tokens

if TYPE_CHECKING:
    from autopeft.search_space.routers.mixing import Routing


class RouterState(nn.Module):
    """What the router of a bank with the mixtures `specs` reads beside the activations, and what it leaves."""

    #: [K, E] with 1 for the experts that a slot's router chooses from.
    owned_experts: Tensor

    def __init__(self, specs: Sequence[AdapterSpec]) -> None:
        super().__init__()
        counts = torch.tensor([spec.num_experts for spec in specs])
        owned = (torch.arange(int(counts.max()))[None, :] < counts[:, None]).float()
        self.register_buffer("owned_experts", owned)
        #: The minibatch.
        self.tokens = Tokens()
        #: Which of its slot's mixtures at the site each one is, from 1.
        self.numbers = [1] * len(specs)
        #: Whether the router is not asked, and all experts are weighted alike.
        self.averaged = False
        #: What the router did in the last forward pass; None: nothing to report.
        self.last: Routing | None = None
        #: The same of every forward pass in evaluation mode; None: nobody watches.
        self.seen: list[Routing] | None = None
        #: Values that a router computes once, by names of its own, from parameters that are not trained.
        self.cached: dict[str, Tensor] = {}

    def note(self) -> None:
        """Add the last forward pass to `seen`, if it is watched."""
        if self.seen is not None and self.last is not None and not self.training:
            self.seen.append(self.last)
