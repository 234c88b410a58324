"""Attachment of the adapters of K slots to one frozen backbone, and their removal.

Notation: K slots; the batch is [K * N, tokens, D], with the N examples of a slot next to each other.
Adapters act through module hooks, through forward functions of single instances (a linear and its LoRA in one
operation) and, for attention prefixes, through transformers' attention interface. The backbone's own modules and
parameters are never replaced: detaching restores them bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from autopeft.evaluators.attachment.groups import groups_at
from autopeft.evaluators.attachment.heads import head_bank, head_sites
from autopeft.evaluators.attachment.hooks import ForwardReplacement, Served, as_modules, fuses, implements, on_slots
from autopeft.evaluators.attachment.layout import by_slot, tapped_input
from autopeft.evaluators.attachment.routers import Routers, banks_of, check_routers
from autopeft.search_space.adapters.head import Head
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.backbones.linear import set_weight, weight_of
from autopeft.search_space.runtime.bank import Bank
from autopeft.search_space.runtime.factors import Starts
from autopeft.search_space.runtime.pool import Pool, Pools, pools_of

if TYPE_CHECKING:
    from autopeft.evaluators.attachment.shared_weights import SharedWeights

#: At a module that ends a sub-layer, adapters of the linear or norm act before adapters of the sub-layer.
SUBLAYER_ROLES = ("attn", "mlp")


class Attachment(nn.Module):
    """The adapters and task heads of K slots on one model. Use it as a context manager, or call `detach`.

    `architectures` and `seeds`: one per slot. `pretrained_head`: start from the model's head weights instead of new
    ones. `shared`: the slots read these weights, from the banks `bank_of_slot` (default: the first), and have none of
    their own. `draw`: draw initial values; otherwise `load_state` must follow. `starts`: see `Bank`. Raises ValueError
    for a candidate that trains the backbone in a pack of more than one, for a site that the backbone lacks, for an
    adapter at an unsuitable site, and for a router that reads later tokens in a causal model; the model is then
    unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone,
        architectures: Sequence[Architecture],
        seeds: Sequence[int] | Sequence[str],
        *,
        pretrained_head: bool = False,
        shared: SharedWeights | None = None,
        bank_of_slot: Sequence[int] | None = None,
        draw: bool = True,
        starts: Starts | None = None,
    ) -> None:
        super().__init__()
        self.model = (model,)  # in a tuple: the backbone is not a child of its adapters
        self.backbone = backbone
        self.architectures = tuple(architectures)
        self.num_slots = len(architectures)
        #: Number of layers below the lowest adapter of all slots; their outputs are the same for every slot.
        self.depth = min(architecture.lowest_layer(backbone) for architecture in architectures)
        self.banks = as_modules([])
        self._slots_of: list[Tensor | None] = []  # per bank: the slots it serves, None for all
        self._handles: list[Any] = []
        self.taps: dict[str, list[Tensor]] = {}  # inputs of sub-layers, by path
        self._trained: list[tuple[nn.Parameter, Tensor]] = []
        banks = [0] * self.num_slots if bank_of_slot is None else list(bank_of_slot)
        starts = starts or Starts()
        for architecture in self.architectures:
            check_routers(architecture, backbone)
        #: Tensors that sites share; `_pool_slots` has the index of each slot in them.
        self.pools: Pools
        if shared is None:
            # Adapters at unsuitable sites are left out here; their banks raise the error.
            fitting = [
                [(site, spec) for site, spec in one.placed(backbone) if site.role in spec.roles and spec.fits(site)]
                for one in self.architectures
            ]
            device = next(model.parameters()).device
            self.pools, self._pool_slots = pools_of(fitting, seeds, device, draw), list(range(self.num_slots))
        else:
            self.pools, self._pool_slots = shared.pools, banks

        placed = {name for architecture in self.architectures for name, _ in architecture.adapters}
        for site in sorted((backbone.site(name) for name in placed), key=backbone.sites.index):
            for slots, specs, nth, numbers in groups_at(site, self.architectures):
                if site.role == "backbone":
                    self._train_backbone(model)
                else:
                    own_seeds = [
                        f"{seeds[k]}#{n - 1}" if n > 1 else seeds[k] for k, n in zip(slots, numbers, strict=True)
                    ]
                    base, of, read = model.get_submodule(site.module), None, None
                    if shared is not None:
                        of, read = shared.bank(site, specs[0].structure(), nth), [banks[k] for k in slots]
                    bank = Bank(site, specs, base, own_seeds, read, of, draw, self.pools, slots, starts)
                    if bank.router is not None:
                        bank.router.numbers = numbers
                    self._add(bank, slots)
        every = list(range(self.num_slots))
        for site in head_sites(model, backbone):
            if shared is None:
                bank = head_bank(site, model, seeds, pretrained_head)
            else:
                specs, of = [Head()] * self.num_slots, shared.bank(site, Head().structure())
                bank = Bank(site, specs, model.get_submodule(site.module), seeds, banks, of)
            self._add(bank, every)
        device = next(model.parameters()).device
        self.to(device)
        self._slots_of = [slots if slots is None else slots.to(device) for slots in self._slots_of]
        self.routers = Routers(self.num_slots, list(zip(self.banks, self._slots_of, strict=True)), model)
        self._hook(model)
        self._was_training = model.training
        self._requires_grad = [(p, p.requires_grad) for p in model.parameters()]
        trained = {parameter for parameter, _ in self._trained}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)
        self.train()

    # Building

    def _add(self, bank: Bank, slots: list[int]) -> None:
        bank.slots_served = slots
        self.banks.append(bank)
        self._slots_of.append(None if slots == list(range(self.num_slots)) else torch.tensor(slots))

    def _train_backbone(self, model: nn.Module) -> None:
        if self.num_slots != 1:
            raise ValueError("a candidate that trains the backbone cannot share it with other candidates")
        head = {p for name in self.backbone.head_modules for p in model.get_submodule(name).parameters()}
        for parameter in model.parameters():
            if parameter not in head:
                self._trained.append((parameter, parameter.detach().clone()))

    def _hook(self, model: nn.Module) -> None:
        served: list[Served] = list(zip(self.banks, self._slots_of, strict=True))
        # Prefixes come first: their installation rejects some models, and nothing has changed before it.
        prefixes = [(bank, slots) for bank, slots in served if implements(bank, "extend_attention")]
        if prefixes:
            from autopeft.evaluators.attachment.attention import install

            self._handles += install(model, prefixes, self.num_slots)
        if self.routers:
            self._handles.append(self.routers.model.register_forward_pre_hook(self.routers.look, with_kwargs=True))
        points: dict[str, list[Served]] = {}
        for bank, slots in served:
            points.setdefault(bank.site.module, []).append((bank, slots))
        taps: set[str] = set()
        for path, here in points.items():
            # Sorting is stable: within a class, the order of `groups_at` remains.
            here.sort(key=lambda pair: pair[0].site.role in SUBLAYER_ROLES)
            module = model.get_submodule(path)
            inputs = [pair for pair in here if implements(pair[0], "apply_input")]
            if inputs:
                self._handles.append(module.register_forward_pre_hook(self._input_hook(inputs)))
            outputs = [pair for pair in here if implements(pair[0], "apply")]
            if outputs and fuses(outputs[0][0], module):
                self._handles.append(ForwardReplacement(module, self._linear(module, *outputs.pop(0))))
            if outputs:
                self._handles.append(module.register_forward_hook(self._output_hook(outputs)))
            taps |= {bank.site.input_module for bank, _ in outputs} - {path}
        for path in taps:
            # Prepended: the input of a sub-layer is read before an adapter at the tapped linear changes it.
            handle = model.get_submodule(path).register_forward_pre_hook(self._tap(path), prepend=True)
            self._handles.append(handle)

    def _linear(self, module: nn.Module, bank: Bank, slots: Tensor | None) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            x = by_slot(input, self.num_slots)
            y = bank.apply_linear(x, slots)
            if y is None:
                y = type(module).forward(module, x)
                y = on_slots(slots, y, bank, x, y)
            return y.reshape(*input.shape[:-1], -1)

        return forward

    def _tap(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.taps.setdefault(path, []).append(args[0])

        return hook

    def _input_hook(self, here: list[Served]) -> Callable[..., tuple[Any, ...]]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = by_slot(args[0], self.num_slots)
            for bank, slots in reversed(here):  # the order of merging: see ADAPTERS
                x = on_slots(slots, x, bank.apply_input, x)
            return (x.reshape(args[0].shape), *args[1:])

        return hook

    def _output_hook(self, here: list[Served]) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            y = by_slot(output, self.num_slots)
            for bank, slots in here:
                tapped = bank.site.input_module != bank.site.module
                x = tapped_input(self.taps[bank.site.input_module], output) if tapped else args[0]
                y = on_slots(slots, y, bank, by_slot(x, self.num_slots), y)
            for bank, _ in here:
                if bank.site.input_module != bank.site.module:  # the graph of a step must not outlive the step
                    self.taps.pop(bank.site.input_module, None)
            return y.reshape(output.shape)

        return hook

    # Use

    def trainable(self) -> Iterator[tuple[nn.Parameter, bool]]:
        """Yield every trained tensor and whether weight decay applies to it."""
        yield from ((value, decay) for bank in self.banks for _, value, decay in bank.trained())
        yield from ((pool.value, pool.decay) for pool in self.pools.values() if pool.trainable)
        yield from ((parameter, parameter.dim() > 1) for parameter, _ in self._trained)

    def num_adapter_params(self) -> int:
        """Return the number of trained parameters without the heads; for one slot, it equals `num_params`."""
        own = sum(v.numel() for bank in self.banks if bank.site.role != "head" for _, v, _ in bank.trained())
        shared = sum(pool.value.numel() for pool in self.pools.values() if pool.trainable)
        return own + shared + sum(parameter.numel() for parameter, _ in self._trained)

    @property
    def trains_backbone(self) -> bool:
        """Whether the candidate trains the backbone itself."""
        return bool(self._trained)

    @override
    def train(self, mode: bool = True) -> Attachment:
        """Set the training mode of the adapters.

        A frozen backbone stays in evaluation mode, so that its activations can be shared and cached; a backbone that is
        trained itself follows `mode`.
        """
        super().train(mode)
        self.model[0].train(mode and self.trains_backbone)
        return self

    def state(self, k: int = 0) -> dict[str, Tensor]:
        """Return copies of the tensors of slot k on the CPU, by `site/kind/name`.

        A second adapter of the same name gets `#2`. Tensors that sites share occur once, as `shared.scope/kind/name`.
        Frozen tensors that are drawn from a key are left out, because the adapter's settings determine them.
        """
        tensors = {
            f"{key}/{name}": value
            for key, bank, j in banks_of(self.banks, k)
            for name, value in bank.of_slot(j).items()
            if name in bank.stored
        }
        tensors |= {pool.key.path: pool.part(slot, shape) for pool, slot, shape in self._pools_of(k) if pool.stored}
        if self._trained:
            names = {p: name for name, p in self.model[0].named_parameters()}
            tensors |= {f"backbone/full/{names[p]}": p for p, _ in self._trained}
        return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], k: int = 0) -> None:
        """Load the tensors of `state` into slot k. Raises KeyError (missing tensor), ValueError (wrong shape)."""
        for key, bank, j in banks_of(self.banks, k):
            bank.load_slot(j, {name: state[f"{key}/{name}"] for name in bank.stored})
        for pool, slot, shape in self._pools_of(k):
            if pool.stored:
                value = state[pool.key.path]
                if value.shape != shape:
                    raise ValueError(f"{pool.key.path}: has shape {tuple(value.shape)}, expected {shape}")
                pool.part(slot, shape).copy_(value)
        if self._trained:
            names = {p: name for name, p in self.model[0].named_parameters()}
            for parameter, _ in self._trained:
                parameter.copy_(state[f"backbone/full/{names[parameter]}"])

    def parts(self, k: int, of: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
        """Return slot k's views of `of`, a tensor per trained parameter of the banks, by the names of `state`."""
        own = {
            f"{key}/{name}": part
            for key, bank, j in banks_of(self.banks, k)
            for name, part in bank.of_slot(j, {n: of[v] for n, v, _ in bank.trained()}).items()
        }
        return own | {
            pool.key.path: pool.part(slot, shape, of[pool.value])
            for pool, slot, shape in self._pools_of(k)
            if pool.trainable
        }

    def _pools_of(self, k: int) -> Iterator[tuple[Pool, int, tuple[int, ...]]]:
        """Yield the pools that the sites of slot k share, the slot's index in each, and the shape of its part."""
        if self.pools:
            for key, parameter in self.architectures[k].shared(self.backbone).items():
                yield self.pools[key], self._pool_slots[k], parameter.shape

    def dropout_streams(self, k: int) -> dict[str, torch.Generator]:
        """Return slot k's random streams by `site/kind`, as in the names of `state`."""
        return {key: bank.dropout_streams[j] for key, bank, j in banks_of(self.banks, k)}

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Merge the adapters of a single slot into the backbone's weights; undo it bit for bit when the block ends.

        An adapter that cannot be merged keeps its hook, and so do all adapters that act after it at the same module.
        With a router that runs the bare model first, all keep their hooks. Raises ValueError for more than one slot.
        """
        if self.num_slots != 1:
            raise ValueError("only a single slot can be merged into the backbone")
        if self.backbone.quantization is not None:
            raise ValueError("adapters cannot be merged into quantised weights: `quantization.dequantize` them first")
        model = self.model[0]
        saved: list[tuple[nn.Module, Tensor, Tensor | None]] = []
        unmerged: list[Bank] = []
        banks, slots_of = self.banks, self._slots_of
        self._unhook()
        try:
            for bank in banks:
                stays = self.routers.bare is not None or any(bank.site.module == one.site.module for one in unmerged)
                if stays or not bank.specs[0].mergeable:
                    unmerged.append(bank)
                    continue
                module = model.get_submodule(bank.site.module)
                weight, bias = weight_of(module), getattr(module, "bias", None)
                saved.append((module, weight.clone(), None if bias is None else bias.detach().clone()))
                with torch.no_grad():
                    set_weight(module, *bank.specs[0].merge(bank.of_slot(0), weight, bias))
            self.banks, self._slots_of = as_modules(unmerged), [None] * len(unmerged)
            self._hook(model)
            yield
        finally:
            self._unhook()
            for module, weight, bias in reversed(saved):
                set_weight(module, weight, bias)
            self.banks, self._slots_of = banks, slots_of
            self._hook(model)

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Remove the hooks within the block: the model computes by its weights alone, merged adapters included."""
        self._unhook()
        try:
            yield
        finally:
            self._hook(self.model[0])

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.taps.clear()

    @torch.no_grad()
    def detach(self) -> None:
        """Remove all adapters; restore the backbone's `requires_grad` flags, training mode and trained values."""
        self._unhook()
        for parameter, value in self._trained:
            parameter.copy_(value)
            parameter.grad = None
        for parameter, flag in self._requires_grad:
            parameter.requires_grad_(flag)
        self.model[0].train(self._was_training)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()
