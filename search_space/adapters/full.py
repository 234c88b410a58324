"""Full fine-tuning, the baseline that trains the backbone itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.parameter import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Full(AdapterSpec):
    """Every parameter of the backbone but the head's is trained in place; the start is the identity.

    It has no bank: the attachment trains the model's own tensors and puts the old values back on detach.
    """

    kind: ClassVar[str] = "full"
    roles: ClassVar[tuple[str, ...]] = ("backbone",)
    default_roles: ClassVar[tuple[str, ...]] = ("backbone",)
    mergeable: ClassVar[bool] = True
    repeatable: ClassVar[bool] = False
    can_be_expert: ClassVar[bool] = False
    source: ClassVar[str] = "Devlin et al. 2019, BERT, section 3.2"
    summary: ClassVar[str] = "training of the whole backbone"

    def parameters(self, site):
        return {"all": Parameter(shape=(site.num_params,))}

    def flops_per_token(self, site):
        return 0
