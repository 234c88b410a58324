"""Tools to connect banks to modules: forward functions of single instances, and changes to some slots of a pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from autopeft.search_space.runtime.bank import Bank

#: A bank and the slots that it serves, None for all of them.
Served = tuple[Bank, Tensor | None]


class ForwardReplacement:
    """A forward function for one module instance in place of its own; `remove` restores the latter."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module = module
        #: An earlier replacement; None: the function is the class's.
        self._before: Callable[..., Any] | None = vars(module).get("forward")
        module.forward = forward

    def remove(self) -> None:
        """Restore the forward function that was there before."""
        if self._before is None:
            del self._module.forward
        else:
            self._module.forward = self._before


def on_slots(slots: Tensor | None, whole: Tensor, change: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return `whole` [K, ...] with the rows of `slots` replaced by `change` of the same rows of `tensors`."""
    if slots is None:
        return change(*tensors)
    return whole.index_copy(0, slots, change(*(tensor.index_select(0, slots) for tensor in tensors)))


def implements(bank: Bank, method: str) -> bool:
    """Return whether the bank's adapters implement `method` at its site."""
    return bank.specs[0].implements(method, bank.site)


def fuses(bank: Bank, module: nn.Module) -> bool:
    """Return whether `bank`, the first to act on the output of `module`, can run with it in one operation."""
    plain = type(module) is nn.Linear and bank.site.module == bank.site.input_module
    return plain and implements(bank, "apply_linear") and "forward" not in vars(module)


def as_modules(banks: list[Bank]) -> list[Bank]:
    """Return the banks as a ModuleList, typed as a list, because mypy does not know the type of its entries."""
    return cast(list[Bank], nn.ModuleList(banks))
