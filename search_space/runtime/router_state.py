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
    """State of the router of a bank whose slots have the mixtures `specs`; see `call.RouterState`."""

    #: [K, E] with 1 for the experts that a slot's router chooses from.
    owned_experts: Tensor

    def __init__(self, specs: Sequence[AdapterSpec]) -> None:
        super().__init__()
        counts = torch.tensor([spec.num_experts for spec in specs])
        owned = (torch.arange(int(counts.max()))[None, :] < counts[:, None]).float()
        self.register_buffer("owned_experts", owned)
        #: The minibatch.
        self.tokens = Tokens()
        #: Number of each mixture among the mixtures of its slot at the site, from 1.
        self.numbers = [1] * len(specs)
        #: Whether all experts get equal gates and the router is not evaluated.
        self.averaged = False
        #: Summary of the last forward pass; None: the router reported none.
        self.last: Routing | None = None
        #: Summaries of all forward passes in evaluation mode; None: recording is off.
        self.seen: list[Routing] | None = None
        #: Values that a router computes once from frozen parameters, by names that it chooses.
        self.cached: dict[str, Tensor] = {}

    def note(self) -> None:
        """Append the summary of the last forward pass to `seen` if recording is on."""
        if self.seen is not None and self.last is not None and not self.training:
            self.seen.append(self.last)
