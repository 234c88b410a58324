"""One choice of experts for every domain of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter
from autopeft.search_space.routers.base import Router, one_row_each

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call
    from autopeft.search_space.routers.mixing import RoutedSpec, Values


class Task(Router):
    """As "token", with z from a column of W_r: [E, tasks] for each of the `tasks`, which are the data's domains.

    As in Polytropon, but for the softmax, and with outputs mixed rather than parameters.
    """

    name: ClassVar[str] = "task"
    source: ClassVar[str] = "Ponti et al. 2022, Polytropon, section 3"
    summary: ClassVar[str] = "softmax over the experts for every domain"
    uses: ClassVar[tuple[str, ...]] = ("top_k", "top_p", "tasks", "router_noise")
    per_text: ClassVar[bool] = True

    @override
    def parameters(self, mixture: RoutedSpec, site: Site) -> dict[str, Parameter]:
        return {"router": one_row_each(mixture, mixture.tasks)}

    @override
    def logits(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        weight = p["router"].to(x.dtype)
        return weight[..., call.router.tokens.domains_of(mixture.tasks)]
