"""Mixtures: several experts of one adapter type at a site, weighted by a router."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import RATE, AdapterSpec, check_at_least, check_one_of
from autopeft.search_space.adapters.lora import DRAWN, Lora, experts_problem
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Site
from autopeft.search_space.parameter import Parameter
from autopeft.search_space.routers import ROUTERS, Follow, Router, Token, Uniform

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values

#: Experts of one site, and as many shared ones.
MOST_EXPERTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture(AdapterSpec):
    """y + sum over e of g_e(x) * delta_e(x), where delta_e is the change by expert e and g: [E] the gates of a router.

    - `router`: a name in `ROUTERS`, whose classes define the gates; most compute them from z = W_r x, W_r: [E, D_in].
    - `shared_experts`: number of additional experts that have the gate 1 for every token (Dai et al. 2024, DeepSeekMoE,
      section 3.2).
    - `ranks`: rank of each LoRA, shared experts first, if the ranks differ (Pirchert et al. 2026, FlexMoRE); `expert`
      has the largest rank.
    - `given`: folders of pretrained LoRAs of the same model, one per expert; the experts are then frozen.
    - `leader`: the site whose gates the router "follow" uses.
    - `balance`, `z_loss`: weights of two terms that are added to the loss of a minibatch, both over all tokens except
      padding: E * sum of f_e P_e, with f the fractions of the tokens and P the mean probabilities (Fedus et al. 2022,
      Switch Transformers, equation 4), and the mean of logsumexp(z)^2 (Zoph et al. 2022, ST-MoE, equation 5).
    - `router_noise`: standard deviation of normal noise that is added to z in training.

    If each expert has rank 1, ranks and experts are the same axis (SMoRA). Experts have no capacity limit, so no token
    is dropped.
    """

    kind: ClassVar[str] = "mixture"
    roles: ClassVar[tuple[str, ...]] = (
        *LINEAR_ROLES,
        "attn",
        "mlp",
        "norm",
    )  # the roles of the expert limit them further
    default_roles: ClassVar[tuple[str, ...]] = Lora.default_roles
    per_slot_fields: ClassVar[tuple[str, ...]] = ("top_k", "top_p", "router_noise", "balance", "z_loss")
    can_be_expert: ClassVar[bool] = False
    identity_at_start: ClassVar[bool] = False  # only if the experts are
    source: ClassVar[str] = "Gao et al. 2024, Higher Layers Need More LoRA Experts (MoLA), section 3"
    summary: ClassVar[str] = "experts of one type and a router"

    expert: AdapterSpec = field(default_factory=Lora)
    experts: int = 4
    shared_experts: int = 0
    router: str = Token.name
    top_k: int = 2
    top_p: float = 1.0
    tasks: int = 1
    heads: int = 1
    router_noise: float = 0.0
    balance: float = 0.01
    z_loss: float = 0.0
    given: tuple[str, ...] = ()
    leader: str = ""
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rate != 1.0:
            raise ValueError("rate: set it on the experts, which pass it on to the router")
        if not self.expert.can_be_expert:
            raise ValueError(f"an adapter of kind {self.expert.kind!r} cannot be an expert")
        if isinstance(self.expert, Lora) and self.expert.init not in DRAWN:
            raise ValueError(f"init: {experts_problem(self.expert.init)}")
        check_at_least("experts", self.experts, 1, MOST_EXPERTS)
        check_at_least("shared_experts", self.shared_experts, 0, MOST_EXPERTS)
        check_one_of("router", self.router, ROUTERS)
        check_at_least("top_k", self.top_k, 1)
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        check_at_least("tasks", self.tasks, 1)
        check_at_least("heads", self.heads, 1)
        object.__setattr__(self, "given", tuple(self.given))  # a file has a list
        if self.given and (type(self.expert) is not Lora or len(self.given) != self.experts or self.shared_experts):
            raise ValueError("given: needs the kind lora, one expert per folder and no shared_experts")
        for problem in self.routed_by.problems(self):
            raise ValueError(problem)
        object.__setattr__(self, "ranks", tuple(self.ranks))
        if self.ranks:
            self._check_ranks()
        for name in ("router_noise", "balance", "z_loss"):
            check_at_least(name, getattr(self, name), 0.0)

    def _check_ranks(self) -> None:
        if type(self.expert) is not Lora or self.given or self.routed_by.mixes_parameters:
            raise ValueError("ranks: need trained experts of kind lora, and a router that does not mix their matrices")
        if len(self.ranks) != self.num_experts_total:
            raise ValueError(
                f"ranks: got {len(self.ranks)} values for {self.num_experts_total} routed and shared experts"
            )
        for rank in self.ranks:
            check_at_least("ranks", rank, 1)
        if self.expert.rank != max(self.ranks):
            object.__setattr__(self, "expert", replace(self.expert, rank=max(self.ranks)))

    @override
    def canonical(self) -> Mixture:
        plain, router = Mixture(), self.routed_by
        same: dict[str, Any] = {name: getattr(plain, name) for name in USED_BY_SOME if name not in router.uses}
        if len(set(self.ranks)) == 1:
            same["ranks"] = ()
        if router.chooses:
            same["top_k"] = min(self.top_k, self.experts)
        return replace(self, **same)

    @property
    @override
    def routed_by(self) -> Router:
        return ROUTERS[self.router]

    @property
    @override
    def plain(self) -> AdapterSpec:
        return self.expert

    @property
    @override
    def averaged(self) -> Mixture:
        return replace(self, router=Uniform.name).canonical()

    @property
    @override
    def standalone(self) -> Mixture:
        return replace(self, router=Token.name, leader="").canonical() if self.routed_by.follows else self

    @property
    @override
    def size(self) -> int | None:
        return self.expert.size

    @property
    @override
    def num_experts(self) -> int:
        return self.experts

    @property
    @override
    def num_experts_total(self) -> int:
        return self.shared_experts + self.experts

    @property
    @override
    def label(self) -> str:
        shared = f"+{self.shared_experts}" if self.shared_experts else ""
        label = f"{self.expert.kind} {min(self.ranks)}-{max(self.ranks)}" if self.ranks else self.expert.label
        return f"{self.experts}{shared} x {label} ({self.router})"

    @property
    @override
    def first_pass(self) -> bool:
        return self.routed_by.first_pass

    @property
    def leader_site(self) -> str:
        """Name of the site in `leader`, without the number of the mixture."""
        return self.leader.partition("#")[0]

    @property
    def each(self) -> tuple[AdapterSpec, ...]:
        """One adapter per expert, shared experts first."""
        if not self.ranks:
            return (self.expert,) * self.num_experts_total
        assert isinstance(self.expert, Lora)
        return tuple(replace(self.expert, rank=rank) for rank in self.ranks)

    @property
    def num_active(self) -> int:
        """Largest number of nonzero gates per token, including shared experts.

        Without `ranks`, this is the number of experts. With `ranks`, each rank has a gate, and this is the sum of the
        ranks of the shared experts and of the largest routed experts that a token can be sent to.
        """
        chosen = self.routed_by.num_chosen(self)
        if not self.ranks:
            return self.shared_experts + chosen
        return sum(self.ranks[: self.shared_experts]) + sum(sorted(self.ranks[self.shared_experts :])[-chosen:])

    @property
    def gated(self) -> AdapterSpec:
        """The adapter that one gate weights: an expert or, with `ranks`, a LoRA of rank 1."""
        return replace(self.expert, rank=1) if isinstance(self.expert, Lora) and self.ranks else self.expert

    @override
    def fits(self, site: Site) -> bool:
        if self.routed_by.between_given and not self.given:
            return False
        return site.role in self.expert.roles and self.expert.fits(site) and self.routed_by.fits(self, site)

    @override
    def structure(self) -> tuple[Any, ...]:
        # The type of the experts comes first: it determines the order among the adapters of a module.
        return (
            *self.expert.structure(),
            self.kind,
            self.router,
            self.shared_experts,
            self.tasks,
            self.heads,
            self.given,
            self.leader_site,
            self.ranks,
        )

    @override
    def parameters(self, site: Site) -> dict[str, Parameter]:
        own = self.expert.parameters(site)
        if self.ranks:  # one LoRA with the sum of the ranks
            total = sum(self.ranks)
            a = replace(own["A"], shape=(total, site.in_features), rows=self.ranks)
            b = replace(own["B"], shape=(site.out_features, total))
            return {"A": a, "B": b, **self.routed_by.parameters(self, site)}
        stacked = {
            name: replace(
                parameter,
                shape=(self.num_experts_total, *parameter.shape),
                per_expert=True,
                given=self.given,
                trainable=parameter.trainable and not self.given,
            )
            for name, parameter in own.items()
        }
        return {**stacked, **self.routed_by.parameters(self, site)}

    @override
    def rate_of(self, name: str) -> float:
        return self.expert.rate if name.startswith("router") else self.expert.rate_of(name)

    @override
    def active_params(self, site: Site) -> int:
        router = sum(parameter.count for parameter in self.routed_by.parameters(self, site).values())
        return self.num_active * self.gated.active_params(site) + router

    @override
    def flops_per_token(self, site: Site) -> int:
        """Return an upper bound of the FLOPs per token of the router and the experts that a token is sent to.

        With `ranks`, the bound assumes the experts of the largest ranks. The implementation may compute more than these
        experts if that is faster.
        """
        return self.routed_by.flops_per_token(self, site)

    @override
    def constants(self, site: Site) -> dict[str, Any]:
        own = {**self.expert.constants(site), **{name: float(getattr(self, name)) for name in self.per_slot_fields}}
        if self.ranks:  # the gate of each expert includes its scale
            own |= {"scale": 1.0, "scales": tuple(expert.constants(site)["scale"] for expert in self.each)}
        return own

    @override
    def implements(self, method: str, site: Site) -> bool:
        if method == "apply_linear":
            return self.routed_by.has_gates and self.expert.implements("mix_linear", site)
        return method in ("apply_input", "apply") and self.expert.implements(method, site)

    @override
    def apply_input(self, p: Values, x: Tensor, call: Call) -> Tensor:
        return x + self.routed_by.mix(self, p, x, None, call)

    @override
    def apply(self, p: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        return y + self.routed_by.mix(self, p, x, y, call)

    @override
    def apply_linear(
        self, p: Values, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, slots: Tensor | None
    ) -> Tensor | None:
        from autopeft.search_space.routers.mixing import expert_values, rank_by_rank

        if call.drops:
            return None
        gates = self.routed_by.gates(self, p, x if slots is None else x.index_select(0, slots), call)
        own, gates = rank_by_rank(self, expert_values(p), gates, call)
        return self.expert.mix_linear(own, gates, x, weight, bias, call, slots)

    @override
    def to_dict(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("ranks", RATE)}
        ranks = {"ranks": list(self.ranks)} if self.ranks else {}  # a later field: older keys must not change
        return {"kind": self.kind, **own, "expert": self.expert.to_dict(), "given": list(self.given), **ranks}


#: Fields of a mixture that are no settings of their own: they follow from other settings.
DERIVED_FIELDS = ("expert", "given", "leader", "ranks", RATE)
#: Fields of a mixture that a study may set in addition to the fields of the experts.
MIXTURE_FIELDS = tuple(f.name for f in fields(Mixture) if f.name not in DERIVED_FIELDS)
#: Fields that have an effect with some routers only; see `Router.uses`.
USED_BY_SOME = ("top_k", "top_p", "tasks", "heads", "leader", "router_noise", "balance", "z_loss")
#: Fields that a following site reads from its leader.
ROUTER_FIELDS = ("router", *(name for name in USED_BY_SOME if name not in Follow.uses))
