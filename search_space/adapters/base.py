"""Interface of an adapter type: fields, parameters, costs and forward functions.

Notation: K slots, S of them served, M tokens of one slot (examples x tokens), D_in and D_out features, E experts, R the
elastic size (LoRA's rank, a bottleneck's width, a prefix's length). At a norm, D_in = D_out.

Forward functions are *slot-batched*: every tensor has the slot dimension K first. The same function then serves a
single candidate (K = 1), a pack of candidates (K banks), and a weight-sharing supernet (one bank, K masks). Torch is
imported inside the functions that need it, so that declaring a space does not import it. The tests check the shapes
in the docstrings of `AdapterSpec` at every call of every type (tests/support/shapes.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.domains import MOST
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values
    from autopeft.search_space.routers.base import Router

#: The field that every type has; it may differ between the slots of a bank.
RATE = "rate"
#: Methods that compute `apply` together with the frozen linear or the weighting of experts, faster than in sequence.
FUSED_METHODS = ("apply_linear", "mix", "mix_linear")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec(ABC):
    """One adapter at one site. Subclasses add fields with defaults and raise ValueError for bad values.

    `rate`: factor of the learning rate of the training for the adapter's tensors. A subclass that checks its own fields
    calls this `__post_init__` too.
    """

    kind: ClassVar[str]
    #: Roles of sites where this type may sit.
    roles: ClassVar[tuple[str, ...]]
    #: Roles used when a study file names none.
    default_roles: ClassVar[tuple[str, ...]]
    #: The field that says how large it is; None for types without a size.
    size_field: ClassVar[str | None] = None
    #: Fields that may differ between the slots of one bank, because they are numbers at run time, not structure.
    per_slot_fields: ClassVar[tuple[str, ...]] = ()
    #: Fields that `to_dict` leaves out at their defaults, so that candidates from before these fields keep their keys.
    later_fields: ClassVar[tuple[str, ...]] = (RATE,)
    #: Whether `merge` folds the adapter into the backbone's weights exactly.
    mergeable: ClassVar[bool] = False
    #: Whether several of this type may sit at one site.
    repeatable: ClassVar[bool] = True
    #: Whether the adapted model equals the backbone before the first step, for all values of the fields.
    identity_at_start: ClassVar[bool] = True
    #: Whether it can be an expert of a mixture, which requires that it changes nothing but activations.
    can_be_expert: ClassVar[bool] = True
    #: Whether it is made of pretrained LoRAs, the folders in its field `given`.
    takes_given: ClassVar[bool] = False
    #: Whether it computes with the backbone's own weight. One module takes one such adapter, since each ignores others.
    reads_weight: ClassVar[bool] = False
    #: Whether `after_step` changes tensors between the steps of a training, including indices.
    moves: ClassVar[bool] = False
    #: What `fits` requires of a site, for messages; empty if every site of the roles fits.
    needs: ClassVar[str] = ""
    #: Where in the paper the mechanism is defined.
    source: ClassVar[str]
    #: One line for `--help` and for tables in the documentation.
    summary: ClassVar[str]

    rate: float = 1.0

    def __post_init__(self) -> None:
        check_positive(RATE, self.rate)

    @abstractmethod
    def parameters(self, site: Site) -> dict[str, Parameter]:
        """Return the tensors at `site` by name; the first is a floating-point tensor of scope "site"."""

    @abstractmethod
    def flops_per_token(self, site: Site) -> int:
        """Return the FLOPs of the matrix products of one forward pass, per token; a multiply-add counts as two."""

    def fits(self, site: Site) -> bool:
        """Return whether the adapter can sit at `site`, whose role is one of `roles`."""
        return True

    @classmethod
    def strictest(cls, offered: Mapping[str, Collection[object]]) -> dict[str, Any]:
        """Return values of fields, among the offered ones by field, with which it fits at the fewest sites."""
        return {}

    def misfit(self, backbone: Backbone) -> str:
        """Return what the type needs of a site, and the roles of the sites of this model that have it."""
        roles = dict.fromkeys(site.role for site in backbone.sites if site.role in self.roles and self.fits(site))
        return f"it needs {self.needs}; " + (f"set at to [{', '.join(roles)}]" if roles else "leave it out")

    def own_parameters(self, site: Site) -> dict[str, Parameter]:
        """Return the tensors of scope "site"; `Architecture` counts the shared ones."""
        return {name: parameter for name, parameter in self.parameters(site).items() if parameter.scope == "site"}

    def num_params(self, site: Site) -> int:
        """Return the number of trainable parameters of scope "site"."""
        return sum(parameter.count for parameter in self.own_parameters(site).values() if parameter.trainable)

    def total_params(self, site: Site) -> int:
        """Return the number of parameters of scope "site", trainable and frozen."""
        return sum(parameter.count for parameter in self.own_parameters(site).values() if not parameter.indices)

    def stored_bits(self, site: Site) -> int:
        """Return the size of the adapter on disk in bits, without shared tensors."""
        return sum(parameter.stored_bits for parameter in self.own_parameters(site).values())

    @property
    def nested(self) -> bool:
        """Whether the initial values of a smaller adapter can be the leading part of those of a larger one."""
        return True

    @property
    def size(self) -> int | None:
        """The value of `size_field`; None for types without a size."""
        return getattr(self, self.size_field) if self.size_field else None

    def rate_of(self, name: str) -> float:
        """Return the factor of the learning rate for the tensor `name` of `parameters`."""
        return self.rate

    @property
    def label(self) -> str:
        """Short name for tables and reports."""
        return self.kind if self.size is None else f"{self.kind} {self.size}"

    @property
    def routed_by(self) -> Router | None:
        """The router of a mixture; None for a plain adapter."""
        return None

    @property
    def num_experts(self) -> int:
        """Number of experts that the router of a mixture chooses from; 0 for a plain adapter."""
        return 0

    @property
    def num_experts_total(self) -> int:
        """Number of routed plus shared experts; 1 for a plain adapter."""
        return 1

    @property
    def first_pass(self) -> bool:
        """Whether it reads hidden states of the model without adapters, which takes an additional forward pass."""
        return False

    @property
    def plain(self) -> AdapterSpec:
        """The adapter itself, or the adapter of each expert of a mixture."""
        return self

    def canonical(self) -> AdapterSpec:
        """Return an equivalent adapter, in which the fields without effect have their defaults."""
        return self

    @property
    def averaged(self) -> AdapterSpec:
        """The adapter itself, or the mixture with equal gates for all experts."""
        return self

    @property
    def standalone(self) -> AdapterSpec:
        """The adapter itself, or for a mixture with a leader one of equal cost without a leader."""
        return self

    def active_params(self, site: Site) -> int:
        """Return the number of parameters active per token; for a mixture, of the router and the active experts."""
        return self.total_params(site)

    def structure(self) -> tuple[Any, ...]:
        """Return the values on which slots of one bank must agree: all but the size and the per-slot fields."""
        apart = {RATE, self.size_field, *self.per_slot_fields}
        return (self.kind, *(getattr(self, f.name) for f in fields(self) if f.name not in apart))

    def implements(self, method: str, site: Site) -> bool:
        """Return whether the type overrides `method` for `site`; if it does not, the site needs no hook for it.

        A method of `FUSED_METHODS` that a parent defines does not count if the type overrides the parent's `apply`,
        because the fused method contains the parent's.
        """
        owner = _owner(type(self), method)
        outdated = method in FUSED_METHODS and not issubclass(owner, _owner(type(self), "apply"))
        return owner is not AdapterSpec and not outdated

    def constants(self, site: Site) -> dict[str, Any]:
        """Return the numbers, or tuples of numbers, that forward functions read per slot (a scale), by name."""
        return {}

    def apply_input(self, p: Values, x: Tensor, call: Call) -> Tensor:
        """Return the site's input with the change by this adapter; the default is x.

        x: [K, M, D_in]. Returns [K, M, D_in].
        """
        return x

    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        """Return the site's output with the change by this adapter; the default is y.

        x: [K, M, D_in], y: [K, M, D_out]. Returns [K, M, D_out].
        """
        return y

    def apply_linear(
        self, p: Values, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, slots: Tensor | None
    ) -> Tensor | None:
        """Return the output of a frozen linear with `apply` on it, in one fused computation.

        x: [K, M, D_in], weight: [D_out, D_in], bias: [D_out], slots: [S]. Returns [K, M, D_out].

        The adapter acts on the S served slots alone (None: all K), whose parameters and context are `p` and `call`. The
        result None, which is the default, means that the fused computation is not possible: the linear and `apply` then
        run in sequence.
        """
        return None

    def mix(self, p: Values, gates: Tensor, x: Tensor, y: Tensor, call: Call) -> Tensor:
        """Return the sum, weighted by the gates, of the changes that E experts of this type make to y.

        gates: [K, M, E], x: [K, M, D_in], y: [K, M, D_out]. Returns [K, M, D_out]. Each tensor of `p` has the shape
        [K, E, ...]. For types without this method, every expert runs on every token (`mixing.one_by_one`).
        """
        raise TypeError(f"adapters of kind {self.kind!r} do not implement `mix`")

    def mix_linear(
        self,
        p: Values,
        gates: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: Call,
        slots: Tensor | None,
    ) -> Tensor:
        """Return the output of a frozen linear plus `mix`, in one fused computation; see `apply_linear`.

        gates: [S, M, E], x: [K, M, D_in], weight: [D_out, D_in], bias: [D_out], slots: [S]. Returns [K, M, D_out]. This
        method is not called in a step with dropout.
        """
        raise TypeError(f"adapters of kind {self.kind!r} do not implement `mix_linear`")

    def extend_attention(self, p: Values, call: Call) -> tuple[Tensor, Tensor]:
        """Return L additional keys and values that every query attends to.

        Returns keys and values, each [K, L, D_kv]. Types without this method add none.
        """
        raise TypeError(f"adapters of kind {self.kind!r} do not implement `extend_attention`")

    def watches(self, step: int) -> bool:
        """Return for a type that moves whether `after_step` reads the gradient of step number `step`, from 1 on."""
        return False

    def after_step(
        self,
        p: Values,
        moments: tuple[Values, Values],
        gradient: Tensor | None,
        notes: dict[str, Tensor],
        step: int,
        steps: int,
    ) -> None:
        """Change the tensors of one slot in place after step number `step` of `steps`; types that move have it.

        `p`: the slot's tensors in its own size; `moments`: AdamW's first and second moments of the trained ones.
        gradient: [...] of what the forward pass gave to `bank.watch.see`, without the slot dimension and before
        clipping; None where no slot watches. `notes`: tensors that the type keeps until later steps; they are part of
        the slot's state, and not of the adapter's.
        """
        raise TypeError(f"adapters of kind {self.kind!r} do not implement `after_step`")

    def merge(self, p: Values, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias of a module with the adapter of one slot folded in.

        weight: [D_out, ...], bias: [D_out]. Returns [D_out, ...] and [D_out]. The weight of a linear has the shape
        [D_out, D_in], the weight of a norm the shape [D_out].
        """
        raise TypeError(f"an adapter of kind {self.kind!r} cannot be merged into the weights")

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the fields, for JSON; the inverse is `spec_from_dict`."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        defaults = {f.name: f.default for f in fields(self) if f.name in self.later_fields}
        return {"kind": self.kind} | {n: v for n, v in own.items() if n not in defaults or v != defaults[n]}


def _owner(kind: type[AdapterSpec], method: str) -> type:
    """Return the class that defines `method` for `kind`."""
    return next(owner for owner in kind.__mro__ if method in vars(owner))


def check_at_least(name: str, value: float, low: float, high: float = MOST) -> None:
    """Raise ValueError unless `value` is a number of at least `low`, and at most `high`, beyond what anybody trains."""
    if isinstance(value, bool) or not value >= low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")
    if value > high:
        raise ValueError(f"{name} must be at most {high:,}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a number greater than 0, and at most `MOST`."""
    check_at_least(name, value, 0)
    if not value:
        raise ValueError(f"{name} must be greater than 0, got {value!r}")


def check_probability(name: str, value: float) -> None:
    """Raise ValueError unless `value` is in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def check_one_of(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
