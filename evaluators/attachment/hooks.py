"""How banks hang on modules: a forward function of one instance, and what changes some slots of a pack alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from autopeft.search_space.runtime.bank import Bank

#: A bank and the slots that it serves, None for all of them.
Served = tuple[Bank, Tensor | None]


class ForwardReplacement:
    """Another forward function for one module, put on the instance; without it, its class's own is found again."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module = module
        module.forward = forward

    def remove(self) -> None:
        del self._module.forward


def on_slots(slots: Tensor | None, whole: Tensor, change: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`whole` with the parts of `slots` replaced by what `change` makes of their parts of `tensors`."""
    if slots is None:
        return change(*tensors)
    return whole.index_copy(0, slots, change(*(tensor.index_select(0, slots) for tensor in tensors)))


def acts(bank: Bank, method: str) -> bool:
    """Whether the bank's adapters do something of their own by `method` at its site."""
    return bank.specs[0].implements(method, bank.site)


def registered(banks: list[Bank]) -> list[Bank]:
    """As modules of the attachment: mypy does not know what a ModuleList holds."""
    return cast(list[Bank], nn.ModuleList(banks))
