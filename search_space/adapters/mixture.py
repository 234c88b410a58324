"""Mixtures: several experts of one adapter type at a site, and a router that says how much each of them adds."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from autopeft.search_space.adapters.base import (
    AdapterSpec,
    check_at_least,
    check_one_of,
)
from autopeft.search_space.adapters.lora import Lora
from autopeft.search_space.backbones.backbone import LINEAR_ROLES
from autopeft.search_space.parameter import Parameter
from autopeft.search_space.routers import (
    BALANCED,
    BETWEEN_GIVEN,
    BY_TASK,
    CHOOSING,
    MIXING,
    ROUTERS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture(AdapterSpec):
    """y + sum over e of g_e(x) * delta_e(x): delta_e is what expert e alone adds, g: E gates that a router sets.

    With a rank of 1 for each expert, ranks and experts are one axis (SMoRA). `shared_experts` of them have the gate 1
    for every token (Dai et al. 2024, DeepSeekMoE, section 3.2). `ranks`: of each LoRA, the shared ones first, where
    they differ (Pirchert et al. 2026, FlexMoRE); `expert` has the largest. With z = W_r x, W_r: [E, D_in], `router` is

    - "token": softmax(z) of the largest `top_k`, of these as few as reach the probability `top_p` together (Huang et
      al. 2024, Harder Tasks Need More Experts, section 2.2), scaled to sum to 1. One expert alone keeps its
      probability, from which the router learns (Fedus et al. 2022, Switch Transformers, section 2.1);
    - "sigmoid": the same with sigmoid(z); the choice is by sigmoid(z) + b, and b follows the load, not the loss (Wang
      et al. 2024, Auxiliary-Loss-Free Load Balancing, section 3);
    - "sequence": "token", from the mean of x over each text;
    - "task": "token", from a row of W_r: [E, tasks] for each of the `tasks` (the data's domains), as in Ponti et al.
      2022 (Polytropon), but for the softmax, and with outputs mixed rather than parameters;
    - "poly": LoRAs' A and B themselves are mixed for each of the `tasks`, by sigmoids of W_r: [E, tasks, heads] scaled
      to sum to 1 over the experts. With several `heads`, blocks of x and y have shares of their own (Caccia et al.
      2023, Multi-Head Adapter Routing, section 3.1; one head: Ponti et al. 2022, Polytropon, section 3);
    - "soft": every expert sees one mean of the tokens, weighted by a softmax of its z over the text, and every token
      the experts by a softmax of z over them (Puigcerver et al. 2023, Soft MoE, section 2.1);
    - "arrow": "token" with z_e = |v_e x|, v_e the first right singular vector of the expert's B A: of LoRAs that are
      given, and nothing to be trained (Ostapenko et al. 2024, Towards Modular LLMs, section 4.2);
    - "xlora": softmax(z) over all experts with z = W_r h + b, W_r: [E, H], h the last hidden state of the token in a
      first pass through the model without adapters; of LoRAs that are given (Buehler and Buehler 2024, X-LoRA; in
      peft's terms a classifier of depth 1 with layerwise scalings);
    - "uniform": 1/E, for comparison: what is left without a router;
    - "follow": the gates of the mixture at the site `leader`, which runs before it: several sites share one router.
      Where there are several mixtures, "site#2" is the second of them in the order of the `Architecture`.

    `given`: folders of LoRAs of the same model, one for each expert, which are then not trained. With "token" that is
    MeteoRA.

    Added to the loss of a minibatch, over all its tokens but padding: `balance` * E * sum of f_e P_e, f the shares of
    the tokens and P the mean probabilities (Fedus et al., equation 4); `z_loss` * mean of logsumexp(z)^2 (Zoph et al.
    2022, ST-MoE, equation 5). `router_noise`: standard deviation of what is added to z in training. No expert has a
    capacity, so no token is dropped.
    """

    kind: ClassVar[str] = "mixture"
    roles: ClassVar[tuple[str, ...]] = (*LINEAR_ROLES, "attn", "mlp", "norm")  # as far as the experts take them
    default_roles: ClassVar[tuple[str, ...]] = Lora.default_roles
    per_slot_fields: ClassVar[tuple[str, ...]] = ("top_k", "top_p", "router_noise", "balance", "z_loss")
    can_be_expert: ClassVar[bool] = False
    identity_at_start: ClassVar[bool] = False  # only if its experts are
    source: ClassVar[str] = "Gao et al. 2024, Higher Layers Need More LoRA Experts (MoLA), section 3"
    summary: ClassVar[str] = "experts of one type and a router"

    expert: AdapterSpec = field(default_factory=Lora)
    experts: int = 4
    shared_experts: int = 0
    router: str = "token"
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
        if not self.expert.can_be_expert:
            raise ValueError(f"an adapter of kind {self.expert.kind!r} cannot be an expert")
        check_at_least("experts", self.experts, 1)
        check_at_least("shared_experts", self.shared_experts, 0)
        check_one_of("router", self.router, ROUTERS)
        check_at_least("top_k", self.top_k, 1)
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        check_at_least("tasks", self.tasks, 1)
        check_at_least("heads", self.heads, 1)
        object.__setattr__(self, "given", tuple(self.given))  # a list, where it was read from a file
        if self.given and (type(self.expert) is not Lora or len(self.given) != self.experts or self.shared_experts):
            raise ValueError("given LoRAs are the experts, all of them, and no others")
        if self.router == "poly" and type(self.expert) is not Lora:
            raise ValueError(f"'poly' mixes the parameters of LoRAs, not of a {self.expert.kind!r}")
        if self.router in MIXING and self.shared_experts:
            raise ValueError(f"a router {self.router!r} has a part for every expert: there are no shared ones")
        object.__setattr__(self, "ranks", tuple(self.ranks))
        if self.ranks:
            self._check_ranks()
        for name in ("router_noise", "balance", "z_loss"):
            check_at_least(name, getattr(self, name), 0.0)

    def _check_ranks(self) -> None:
        if type(self.expert) is not Lora or self.given or self.router == "poly":
            raise ValueError("ranks are for LoRAs that are trained, and not mixed into one")
        if len(self.ranks) != self.num_experts_total:
            raise ValueError(f"{len(self.ranks)} ranks for {self.num_experts_total} experts")
        for rank in self.ranks:
            check_at_least("ranks", rank, 1)
        if self.expert.rank != max(self.ranks):
            object.__setattr__(self, "expert", replace(self.expert, rank=max(self.ranks)))

    def canonical(self) -> Mixture:
        """The same network and training, with the fields that make no difference to these at their defaults."""
        plain, same = Mixture(), dict[str, Any]()
        if len(set(self.ranks)) == 1:
            same["ranks"] = ()
        if self.router in CHOOSING:
            same["top_k"] = min(self.top_k, self.experts)
        idle = {
            "top_k": self.router not in CHOOSING,
            "top_p": self.router not in CHOOSING or self.router == "follow",
            "tasks": self.router not in BY_TASK,
            "heads": self.router != "poly",
            "leader": self.router != "follow",
            "router_noise": self.router in ("poly", "uniform", "follow"),
            "balance": self.router not in BALANCED,
            "z_loss": self.router not in BALANCED,
        }
        same |= {name: getattr(plain, name) for name, is_idle in idle.items() if is_idle}
        return replace(self, **same)

    @property
    def plain(self):
        return self.expert

    @property
    def size(self):
        return self.expert.size

    @property
    def num_experts(self):
        return self.experts

    @property
    def label(self):
        shared = f"+{self.shared_experts}" if self.shared_experts else ""
        label = f"{self.expert.kind} {min(self.ranks)}-{max(self.ranks)}" if self.ranks else self.expert.label
        return f"{self.experts}{shared} x {label} ({self.router})"

    def fits(self, site):
        if self.router in BETWEEN_GIVEN and not self.given:
            return False  # what they have learnt is what these routers go by
        if self.router == "xlora" and not site.hidden_size:
            return False
        whole_blocks = site.in_features % self.heads == 0 and site.out_features % self.heads == 0
        return site.role in self.expert.roles and self.expert.fits(site) and whole_blocks

    def structure(self):
        # The type of the experts comes first: it says when the mixture acts among the adapters of a module.
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

    @property
    def leader_site(self) -> str:
        """Of `leader`, without the number."""
        return self.leader.partition("#")[0]

    def parameters(self, site):
        own = self.expert.parameters(site)
        if self.ranks:  # those of one LoRA, which has the ranks of all
            total = sum(self.ranks)
            a = replace(own["A"], shape=(total, site.in_features), rows=self.ranks)
            b = replace(own["B"], shape=(site.out_features, total))
            return {"A": a, "B": b, **self.router_parameters(site)}
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
        return {**stacked, **self.router_parameters(site)}

    def router_parameters(self, site):
        """Those of the router alone."""
        if self.router in ("arrow", "uniform", "follow"):
            return {}
        widths = {"task": (self.tasks,), "poly": (self.tasks, self.heads), "xlora": (site.hidden_size,)}
        shape = (self.experts, *widths.get(self.router, (site.in_features,)))
        own = {"router": Parameter(shape=shape, init="small_normal", per_expert=True)}
        if self.router in ("sigmoid", "xlora"):
            own["router_bias"] = Parameter(shape=(self.experts,), decay=False, per_expert=True)
        return own

    @property
    def first_pass(self):
        return self.router == "xlora"

    @property
    def num_experts_total(self):
        return self.shared_experts + self.experts

    @property
    def each(self) -> tuple[AdapterSpec, ...]:
        """The experts one by one, the shared ones first."""
        if not self.ranks:
            return (self.expert,) * self.num_experts_total
        assert isinstance(self.expert, Lora)
        return tuple(replace(self.expert, rank=rank) for rank in self.ranks)

    @property
    def num_active(self) -> int:
        """Experts that a token meets at most, with the shared ones; mixed parameters are those of one. Where ranks
        differ, the ranks of these, of the largest that it can be sent to: each has a gate.
        """
        if self.router == "poly":
            return 1
        chosen = min(self.top_k, self.experts) if self.router in CHOOSING else self.experts
        if not self.ranks:
            return self.shared_experts + chosen
        return sum(self.ranks[: self.shared_experts]) + sum(sorted(self.ranks[self.shared_experts :])[-chosen:])

    @property
    def gated(self) -> AdapterSpec:
        """What has a gate: an expert or, where ranks differ, a rank of one."""
        return replace(self.expert, rank=1) if isinstance(self.expert, Lora) and self.ranks else self.expert

    def active_params(self, site):
        router = sum(parameter.count for parameter in self.router_parameters(site).values())
        return self.num_active * self.gated.active_params(site) + router

    def flops_per_token(self, site):
        """Of the experts that a token is sent to, at most, and of the router: where their ranks differ, of the largest.
        A mixture may compute more where that is faster. Decisions for a whole text count as none for its tokens, and so
        do the experts of a soft dispatch.
        """
        if self.router == "soft":
            return 2 * self.experts * (2 * site.in_features + site.out_features)
        seen = site.hidden_size if self.router == "xlora" else site.in_features
        router = 2 * self.experts * seen if self.router in ("token", "sigmoid", "arrow", "xlora") else 0
        return router + self.num_active * self.gated.flops_per_token(site)

    def constants(self, site):
        own = {**self.expert.constants(site), **{name: float(getattr(self, name)) for name in self.per_slot_fields}}
        if self.ranks:  # each expert has a scale of its own, which is put into its gate
            own |= {"scale": 1.0, "scales": tuple(expert.constants(site)["scale"] for expert in self.each)}
        return own

    def implements(self, method, site):
        if method == "apply_linear":
            return self.router not in MIXING and self.expert.implements("mix_linear", site)
        return method in ("apply_input", "apply") and self.expert.implements(method, site)

    def apply_input(self, p, x, call):
        from autopeft.search_space.routers.mixing import mixed_input

        return mixed_input(self, p, x, call)

    def apply(self, p, x, y, call):
        from autopeft.search_space.routers.mixing import mixed

        return mixed(self, p, x, y, call)

    def apply_linear(self, p, x, weight, bias, call, slots):
        from autopeft.search_space.routers.mixing import mixed_linear

        return None if call.drops else mixed_linear(self, p, x, weight, bias, call, slots)

    def to_dict(self):
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "ranks"}
        ranks = {"ranks": list(self.ranks)} if self.ranks else {}  # they came later: keys of before stay what they were
        return {"kind": self.kind, **own, "expert": self.expert.to_dict(), "given": list(self.given), **ranks}


#: What a mixture adds to the fields of its experts' type.
MIXTURE_FIELDS = tuple(f.name for f in fields(Mixture) if f.name not in ("expert", "given", "leader", "ranks"))
#: Those that are the router's own.
ROUTER_FIELDS = ("router", "top_p", "tasks", "heads", "router_noise", "balance", "z_loss")
