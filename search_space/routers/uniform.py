"""All experts weighted alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.routers.base import Router

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call
    from autopeft.search_space.routers.mixing import RoutedSpec, Values


class Uniform(Router):
    """1/E for each of the experts, for comparison: what is left without a router."""

    name: ClassVar[str] = "uniform"
    source: ClassVar[str] = "Caccia et al. 2023, Multi-Head Adapter Routing (MHR-mu), but trained so from the start"
    summary: ClassVar[str] = "all experts weighted alike, for comparison"
    constant: ClassVar[bool] = True

    @override
    def decide(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        from autopeft.search_space.routers.mixing import equal_gates

        return equal_gates(x.shape[1], call)
