"""One choice of experts for each domain of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter
from autopeft.search_space.routers.base import Router, one_row_each

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values
    from autopeft.search_space.routers.mixing import RoutedSpec


class Task(Router):
    """Like "token", with z a column of W_r: [E, tasks]; the `tasks` are the domains of the data.

    Unlike Polytropon, it uses a softmax and mixes outputs instead of parameters.
    """

    name: ClassVar[str] = "task"
    source: ClassVar[str] = "Ponti et al. 2022, Polytropon, section 3"
    summary: ClassVar[str] = "softmax over the experts for each domain"
    uses: ClassVar[tuple[str, ...]] = ("top_k", "top_p", "tasks", "router_noise")
    per_text: ClassVar[bool] = True

    @override
    def parameters(self, mixture: RoutedSpec, site: Site) -> dict[str, Parameter]:
        return {"router": one_row_each(mixture, mixture.tasks)}

    @override
    def logits(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        weight = p["router"].to(x.dtype)
        return weight[..., call.router.tokens.domains_of(mixture.tasks)]
