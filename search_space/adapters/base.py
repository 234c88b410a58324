"""What an adapter type declares: its fields, its parameters, its costs and its one forward function.

Notation: K slots, M tokens of one slot's examples (examples x tokens), D_in and D_out features, R the elastic
size (LoRA's rank, a bottleneck's width, a prefix's length).

A type is written *slot-batched*: every tensor it sees leads with the slot dimension K. The same function then
serves a single candidate (K = 1), a pack of candidates (K banks), and a weight-sharing supernet (one bank, K
masks). Torch is imported inside the functions that need it, so that declaring a space stays free of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call
    from autopeft.search_space.routers.base import Router

#: Of a number on disk: float32, or int32 for those that are indices.
NUMBER_BITS = 32
#: Methods that do what `apply` does together with something else, faster than one after the other.
FUSED_METHODS = ("apply_linear", "mix", "mix_linear")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec(ABC):
    """One adapter at one site. Subclasses add fields with defaults and raise ValueError for bad values."""

    kind: ClassVar[str]
    #: Roles of sites where this type may sit.
    roles: ClassVar[tuple[str, ...]]
    #: Roles used when a study file names none.
    default_roles: ClassVar[tuple[str, ...]]
    #: The field that says how large it is; None for types without a size.
    size_field: ClassVar[str | None] = None
    #: Fields that may differ between the slots of one bank (they are numbers at run time, not structure).
    per_slot_fields: ClassVar[tuple[str, ...]] = ()
    #: Whether `merge` folds it into the backbone's weights exactly.
    mergeable: ClassVar[bool] = False
    #: Whether several of this type may sit at one site.
    repeatable: ClassVar[bool] = True
    #: Whether it computes the backbone's function before the first step, for every setting of its fields.
    identity_at_start: ClassVar[bool] = True
    #: Whether it can be an expert of a mixture: it changes activations, and nothing else.
    can_be_expert: ClassVar[bool] = True
    #: Where in the paper the mechanism is defined.
    source: ClassVar[str]
    #: One line for `--help` and the tables of the documentation.
    summary: ClassVar[str]

    @abstractmethod
    def parameters(self, site: Site) -> dict[str, Parameter]:
        """Return the tensors at `site` by name; the first has floating-point values of the site's own."""

    @abstractmethod
    def flops_per_token(self, site: Site) -> int:
        """Return the operations of the matrix products of one forward pass, per token; a multiply-add is two."""

    def fits(self, site: Site) -> bool:
        """Return whether the type can sit at `site`, which has one of its roles."""
        return True

    def own_parameters(self, site: Site) -> dict[str, Parameter]:
        """Return the tensors of the site alone: `Architecture` counts those that sites share."""
        return {name: parameter for name, parameter in self.parameters(site).items() if parameter.scope == "site"}

    def num_params(self, site: Site) -> int:
        """Return the number of trained parameters of the site's own."""
        return sum(parameter.count for parameter in self.own_parameters(site).values() if parameter.trainable)

    def total_params(self, site: Site) -> int:
        """Return the number of parameters of the site's own, the frozen ones too."""
        return sum(parameter.count for parameter in self.own_parameters(site).values() if not parameter.indices)

    def stored_bits(self, site: Site) -> int:
        """Return the bits that the adapter takes on disk, without what it shares."""
        return NUMBER_BITS * sum(
            parameter.count for parameter in self.own_parameters(site).values() if parameter.stored
        )

    @property
    def size(self) -> int | None:
        """The value of `size_field`; None for types without a size."""
        return getattr(self, self.size_field) if self.size_field else None

    @property
    def label(self) -> str:
        """A word or two for tables and reports."""
        return self.kind if self.size is None else f"{self.kind} {self.size}"

    @property
    def routed_by(self) -> Router | None:
        """The router of a mixture; None for a plain adapter."""
        return None

    @property
    def num_experts(self) -> int:
        """Experts that the router of a mixture chooses from; 0 for a plain adapter."""
        return 0

    @property
    def num_experts_total(self) -> int:
        """Routed plus shared experts; 1 for a plain adapter."""
        return 1

    @property
    def first_pass(self) -> bool:
        """Whether it reads what the model without adapters makes of a text, which takes a forward pass of its own."""
        return False

    @property
    def plain(self) -> AdapterSpec:
        """The adapter itself, or the one that each expert of a mixture is."""
        return self

    def canonical(self) -> AdapterSpec:
        """Return the same network and training, with fields that make no difference at their defaults."""
        return self

    @property
    def averaged(self) -> AdapterSpec:
        """The adapter itself, or the mixture with all experts weighted alike."""
        return self

    @property
    def standalone(self) -> AdapterSpec:
        """The adapter itself, or a mixture that costs as much where it does not need the site that it follows."""
        return self

    def active_params(self, site: Site) -> int:
        """Return the number of parameters active per token: of a mixture the router's and those of active experts."""
        return self.total_params(site)

    def structure(self) -> tuple[Any, ...]:
        """Return what slots must agree on to share one bank: everything but the size and the per-slot fields."""
        apart = {self.size_field, *self.per_slot_fields}
        return (self.kind, *(getattr(self, f.name) for f in fields(self) if f.name not in apart))

    def implements(self, method: str, site: Site) -> bool:
        """Return whether the type has a `method` of its own at `site`; without one it needs no hook there.

        One of `FUSED_METHODS` that was written for the `apply` of a parent does not count where the type has another
        `apply`.
        """
        owner = _owner(type(self), method)
        outdated = method in FUSED_METHODS and not issubclass(owner, _owner(type(self), "apply"))
        return owner is not AdapterSpec and not outdated

    def constants(self, site: Site) -> dict[str, Any]:
        """Return numbers, or tuples of them, that the forward function reads per slot (a scale), by name."""
        return {}

    def apply_input(self, p: Mapping[str, Tensor], x: Tensor, call: Call) -> Tensor:
        """Return the site's input as changed by this adapter. x: [K, M, D_in]. Default: x."""
        return x

    def apply(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, call: Call) -> Tensor:
        """Return the site's output as changed by this adapter. x: [K, M, D_in], y: [K, M, D_out]. Default: y."""
        return y

    def apply_linear(
        self,
        p: Mapping[str, Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: Call,
        slots: Tensor | None,
    ) -> Tensor | None:
        """Return the output of a frozen linear with this adapter, computed in one: [K, M, D_out].

        weight: [D_out, D_in] and bias: [D_out] act on x: [K, M, D_in], and what `apply` does on the served `slots`: [S]
        (None: all). p and `call` are those of the S slots. Default, and where it cannot: None, and the two run one
        after the other.
        """
        return None

    def mix(self, p: Mapping[str, Tensor], gates: Tensor, x: Tensor, y: Tensor, call: Call) -> Tensor:
        """Return what E experts of this type, weighted by gates [K, M, E], add to y: [K, M, D_out].

        p: [K, E, ...] each, x: [K, M, D_in]. Types that do not implement it have every expert run on every token
        (`mixing.one_by_one`).
        """
        raise TypeError(f"adapters of kind {self.kind!r} are mixed one by one")

    def mix_linear(
        self,
        p: Mapping[str, Tensor],
        gates: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: Call,
        slots: Tensor | None,
    ) -> Tensor:
        """Return the output of a frozen linear with what `mix` adds, computed in one; see `apply_linear`.

        gates: [S, M, E]. It is not called in a step with dropout.
        """
        raise TypeError(f"adapters of kind {self.kind!r} do not run with a linear")

    def extend_attention(self, p: Mapping[str, Tensor], call: Call) -> tuple[Tensor, Tensor]:
        """Return keys and values that every query may attend to, each [K, L, D_kv]. Default: none are added."""
        raise TypeError(f"an adapter of kind {self.kind!r} does not extend attention")

    def merge(self, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight [D_out, D_in] (a norm's: [D]) and bias [D_out] with the adapter of one slot folded in."""
        raise TypeError(f"an adapter of kind {self.kind!r} cannot be merged into the weights")

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the fields, for JSON; the inverse is `spec_from_dict`."""
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}


def _owner(kind: type[AdapterSpec], method: str) -> type:
    """Return the class that `kind` has a method from."""
    return next(owner for owner in kind.__mro__ if method in vars(owner))


def check_at_least(name: str, value: float, low: float) -> None:
    """Raise ValueError unless `value` is a number of at least `low`."""
    if isinstance(value, bool) or not value >= low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")


def check_probability(name: str, value: float) -> None:
    """Raise ValueError unless `value` is in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def check_one_of(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
