"""The gates of another site's mixture."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.routers.base import Router

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call
    from autopeft.search_space.routers.mixing import RoutedSpec, Values


class Follow(Router):
    """The gates of the mixture at the site `leader`, which runs before it: several sites share one router.

    Where there are several mixtures, "site#2" is the second of them in the order of the `Architecture`.
    """

    name: ClassVar[str] = "follow"
    source: ClassVar[str] = "a router of this package; the gates are those of the leader's paper"
    summary: ClassVar[str] = "the gates of another site of the layer"
    uses: ClassVar[tuple[str, ...]] = ("top_k", "leader")

    @override
    def decide(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        leaders = [own.leader for own in call.bank.specs]
        gates: Tensor = call.router.tokens.gates_of(leaders, call.bank, call.router.owned_experts.shape[-1])
        return gates
