"""Full fine-tuning: the baseline that trains the backbone itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Full(AdapterSpec):
    """Training in place of all parameters of the backbone except the head's; the start is the identity.

    There is no bank: the attachment trains the model's own tensors and restores the original values on detach.
    """

    kind: ClassVar[str] = "full"
    roles: ClassVar[tuple[str, ...]] = ("backbone",)
    default_roles: ClassVar[tuple[str, ...]] = ("backbone",)
    mergeable: ClassVar[bool] = True
    repeatable: ClassVar[bool] = False
    can_be_expert: ClassVar[bool] = False
    source: ClassVar[str] = "Devlin et al. 2019, BERT, section 3.2"
    summary: ClassVar[str] = "training of the whole backbone"

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        return {"all": Parameter(shape=(site.num_params,))}

    @override
    def flops_per_token(self, site: Site) -> int:
        return 0
