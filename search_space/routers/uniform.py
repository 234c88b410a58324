"""Equal gates for all experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.routers.base import Router

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values
    from autopeft.search_space.routers.mixing import RoutedSpec


class Uniform(Router):
    """Gates of 1/E: the baseline without a router."""

    name: ClassVar[str] = "uniform"
    source: ClassVar[str] = (
        "Caccia et al. 2023, Multi-Head Adapter Routing (MHR-mu), but with equal gates from the start"
    )
    summary: ClassVar[str] = "equal gates for all experts, as a baseline"
    constant: ClassVar[bool] = True

    @override
    def decide(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        from autopeft.search_space.routers.mixing import equal_gates

        return equal_gates(x.shape[1], call)
