"""Prefixes inside attention, through transformers' attention interface.

Notation: K slots of N examples each, next to each other in the batch B = K * N; H heads of keys and values,
T queries, S keys, L prefix positions, d features of a head.

At every call, a model of transformers 5 looks up its attention function by the name in its config. So no part of the
model is replaced: its attention modules get an attribute with their prefixes, and its config gets the name of a
function that prepends them to the keys and values and calls the original function. A prefix is not part of a key/value
cache: it is prepended again at each step of a generation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from autopeft.search_space.backbones.attention import uses_attention_interface
from autopeft.search_space.runtime.bank import Bank

ATTRIBUTE = "autopeft_prefixes"
# Functions that take a mask per query and key. Flash attention takes none; flex attention takes a function.
BASES = ("sdpa", "eager")
#: The signature depends on the model's family.
AttentionFunction = Callable[..., Any]


class Prefixes:
    """The prefixes that the slots prepend to the keys and values of one attention module.

    `banks`: each with the slots that it serves (None: all). Other slots own no prefix position.
    """

    def __init__(self, banks: Sequence[tuple[Bank, Tensor | None]], num_slots: int) -> None:
        self.banks = tuple(banks)
        self.num_slots = num_slots
        self.all_owned = all(slots is None and bank.mask is None for bank, slots in banks)

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys [K, L, D_kv], values [K, L, D_kv], and a mask of the positions that each slot owns [K, L]."""
        parts: list[list[Tensor]] = []
        for bank, slots in self.banks:
            keys, values = bank.specs[0].extend_attention(bank.slots(), bank.call)
            owned = keys.new_ones(keys.shape[:2]) if bank.mask is None else bank.mask
            parts.append([self._spread(tensor, slots) for tensor in (keys, values, owned.bool())])
        keys, values, owned = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        return keys, values, owned

    def _spread(self, tensor: Tensor, slots: Tensor | None) -> Tensor:
        """Return a tensor of all slots, with zeros for the slots that are not served."""
        if slots is None:
            return tensor
        return tensor.new_zeros(self.num_slots, *tensor.shape[1:]).index_copy(0, slots, tensor)


def _per_example(prefix: Tensor, like: Tensor) -> Tensor:
    """Reshape [K, L, H * d] to [B, H, L, d], with the heads and the dtype of `like` [B, H, S, d]."""
    batch, heads, _, features = like.shape
    split: Tensor = prefix.to(like.dtype).unflatten(-1, (heads, features)).transpose(1, 2)
    return split.repeat_interleave(batch // len(split), dim=0)


def _explicit_mask(
    base: str, module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None, all_owned: bool
) -> Tensor | None:
    """Return the mask [1, 1, T, S] that `base` implies by None, or None if the prefix needs no mask."""
    size = query.shape[2], key.shape[2]
    if base == "eager":
        return None if all_owned else query.new_zeros(1, 1, *size)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    open_mask = torch.ones(1, 1, *size, dtype=torch.bool, device=query.device)
    if is_causal and size[0] > 1:
        # sdpa's causal flag would align the first query with the first key, which is now a key of the prefix.
        return open_mask.tril()
    return None if all_owned else open_mask


def _extend_mask(mask: Tensor, owned: Tensor) -> Tensor:
    """Prepend L columns to `mask` [B or 1, 1 or heads, T, S]: open where `owned` [B, L], else closed."""
    if mask.dtype != torch.bool:
        owned = torch.zeros_like(owned, dtype=mask.dtype).masked_fill(~owned, float("-inf"))
    front = owned[:, None, None, :].expand(-1, *mask.shape[1:3], -1)
    return torch.cat([front, mask.expand(len(owned), -1, -1, -1)], dim=-1)


def _base_function(base: str, module: nn.Module) -> AttentionFunction:
    if base == "eager":
        # Each modeling file has its own (with soft caps, say), the default of the look-up in its attention's forward.
        return cast(AttentionFunction, inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"])
    return cast(AttentionFunction, AttentionInterface()[base])


def _prefixed(base: str) -> AttentionFunction:
    """Return the attention function `base` with the module's prefixes prepended; without prefixes, it is `base`."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        attend = _base_function(base, module)
        prefixes: Prefixes | None = getattr(module, ATTRIBUTE, None)
        if prefixes is None:
            return attend(module, query, key, value, attention_mask, **kwargs)

        keys, values, owned = prefixes.read()
        mask = attention_mask
        if mask is None:
            mask = _explicit_mask(base, module, query, key, kwargs.pop("is_causal", None), prefixes.all_owned)
            kwargs["is_causal"] = False
        if mask is not None:
            mask = _extend_mask(mask, owned.repeat_interleave(len(query) // len(owned), dim=0))
        key = torch.cat([_per_example(keys, key), key], dim=2)
        value = torch.cat([_per_example(values, value), value], dim=2)
        return attend(module, query, key, value, mask, **kwargs)

    return attention


_PREFIXED = {base: f"autopeft_prefix_{base}" for base in BASES}
for _base, _name in _PREFIXED.items():
    AttentionInterface.register(_name, _prefixed(_base))
    # The model builds the same masks as for `base`.
    AttentionMaskInterface.register(_name, AttentionMaskInterface()[_base])


class Installed:
    """The handle that undoes `install`."""

    def __init__(self, modules: Sequence[nn.Module], configs: Sequence[tuple[Any, str]]) -> None:
        self._modules = list(modules)
        self._configs = list(configs)

    def remove(self) -> None:
        """Remove the prefixes and restore the attention functions."""
        for module in self._modules:
            delattr(module, ATTRIBUTE)
        for config, name in self._configs:
            _set_implementation(config, name)
        self._modules.clear()
        self._configs.clear()


def _set_implementation(config: Any, name: str) -> None:
    config._attn_implementation = {"": name}  # a mapping leaves the sub-configs unchanged


def install(model: nn.Module, banks: Sequence[tuple[Bank, Tensor | None]], num_slots: int) -> list[Installed]:
    """Install the prefixes of `banks`, each with the slots that it serves (None: all), in the attention modules.

    Returns the handles that remove them. Raises ValueError, before any change, for an attention module that does not
    use transformers' attention interface, or uses a function that takes no mask.
    """
    by_path: dict[str, list[tuple[Bank, Tensor | None]]] = {}
    for bank, slots in banks:
        if bank.site.attention_module is None:
            raise ValueError(f"a prefix needs an attention module, and the site {bank.site.name!r} has none")
        by_path.setdefault(bank.site.attention_module, []).append((bank, slots))
    modules: dict[str, Any] = {path: model.get_submodule(path) for path in by_path}
    for path, module in modules.items():
        if not uses_attention_interface(module):
            raise ValueError(
                f"no prefix can be attached at {path!r}: {type(module).__name__} does not use transformers' "
                "attention interface"
            )
        name = module.config._attn_implementation
        if name not in BASES:
            raise ValueError(
                f"no prefix can be attached at {path!r}: its attention function is {name!r}, not "
                f"{' or '.join(BASES)}; load the model with attn_implementation='sdpa'"
            )
    configs = {id(module.config): module.config for module in modules.values()}.values()
    names = [(config, config._attn_implementation) for config in configs]
    for path, module in modules.items():
        setattr(module, ATTRIBUTE, Prefixes(by_path[path], num_slots))
    for config, name in names:
        _set_implementation(config, _PREFIXED[name])
    return [Installed(list(modules.values()), names)]
