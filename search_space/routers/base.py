"""What a router declares: the fields that it reads, its parameters, its costs, and how it mixes the experts.

Notation: K slots, N texts of T tokens, M = N * T, E experts that a router chooses from, S shared ones, D_in and D_out
features. As an adapter's, a router's forward functions are slot-batched, and torch is imported inside them alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call
    from autopeft.search_space.routers.mixing import Decision, RoutedSpec, Values


class Router:
    """How a mixture weighs its experts. Instances have no state: `call.router` has what lasts from call to call.

    A router with gates implements `logits`, from which `decide` takes the gates, or `decide` itself. One that is no
    weighted sum of the experts implements `mix`.
    """

    __slots__ = ()

    #: What `Mixture.router` names it by.
    name: ClassVar[str]
    #: Where in the paper the mechanism is defined.
    source: ClassVar[str]
    #: One line for tables.
    summary: ClassVar[str]
    #: Fields of `Mixture` that make a difference to it, of the numbers of a router; the others are idle.
    uses: ClassVar[tuple[str, ...]] = ()
    #: Whether it decides once for a whole text.
    per_text: ClassVar[bool] = False
    #: Whether it reads later tokens of a text before it decides about the first one.
    reads_ahead: ClassVar[bool] = False
    #: Whether it reads the last hidden states of the model without adapters, which takes a forward pass of its own.
    first_pass: ClassVar[bool] = False
    #: Whether it needs LoRAs that are given, from whose values it decides.
    between_given: ClassVar[bool] = False
    #: Whether the gates of all experts are equal, whatever the input.
    constant: ClassVar[bool] = False
    #: Whether the experts' outputs are summed with gates. Without them there are no shared experts, which have gate 1.
    has_gates: ClassVar[bool] = True
    #: Whether other sites can have its gates.
    can_lead: ClassVar[bool] = True
    #: Whether it makes one LoRA of the experts' matrices, which are LoRAs of one rank then.
    mixes_parameters: ClassVar[bool] = False

    @property
    def chooses(self) -> bool:
        """Whether it sends a token to `top_k` of the experts only."""
        return "top_k" in self.uses

    @property
    def balanced(self) -> bool:
        """Whether its losses ask for the same load on every expert."""
        return "balance" in self.uses

    @property
    def needs_domains(self) -> bool:
        """Whether it reads the domain of a text."""
        return "tasks" in self.uses

    @property
    def follows(self) -> bool:
        """Whether it has the gates of the mixture at another site."""
        return "leader" in self.uses

    # Declaration

    def problems(self, mixture: RoutedSpec) -> Iterator[str]:
        """Yield why the router cannot serve a mixture with these fields, wherever it sits."""
        if self.mixes_parameters and mixture.expert.kind != "lora":
            yield f"{self.name!r} mixes the parameters of LoRAs, not of a {mixture.expert.kind!r}"
        if not self.has_gates and mixture.shared_experts:
            yield f"router {self.name!r} does not support shared_experts"

    def fits(self, mixture: RoutedSpec, site: Site) -> bool:
        """Return whether the router can serve a mixture at `site`."""
        return True

    def parameters(self, mixture: RoutedSpec, site: Site) -> dict[str, Parameter]:
        """Return the router's tensors; their names begin with "router", and those of experts do not."""
        return {}

    def num_chosen(self, mixture: RoutedSpec) -> int:
        """Return how many experts a token meets at most, without the shared ones."""
        return min(mixture.top_k, mixture.experts) if self.chooses else mixture.experts

    def own_flops_per_token(self, mixture: RoutedSpec, site: Site) -> int:
        """Return the operations of the router alone; a decision for a whole text counts as none for its tokens."""
        return 0

    def flops_per_token(self, mixture: RoutedSpec, site: Site) -> int:
        """Return the operations of the mixture; see `AdapterSpec.flops_per_token`."""
        experts: int = mixture.num_active * mixture.gated.flops_per_token(site)
        return self.own_flops_per_token(mixture, site) + experts

    # At run time

    def mix(self, mixture: RoutedSpec, p: Values, x: Tensor, y: Tensor | None, call: Call) -> Tensor:
        """Return what the experts add to y: [K, M, D_out].

        Where they act on a site's input, y is None, and they add to x: [K, M, D_in].
        """
        from autopeft.search_space.routers.mixing import expert_values, weighted

        return weighted(mixture, expert_values(p), self.gates(mixture, p, x, call), x, y, call)

    def gates(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        """Return gates [K, M, S + E] in the bank's type, for x: [K, M, D_in] maybe in the backbone's."""
        from autopeft.search_space.routers.mixing import equal_gates, with_shared

        call.router.last = None
        gates = equal_gates(x.shape[1], call) if call.router.averaged else self.decide(mixture, p, x, call)
        return with_shared(gates.to(call.bank.dtype), mixture.shared_experts)

    def decide(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        """Return gates [K, M, E] from the logits, and leave the pass's `Routing` and what followers read in `call`."""
        from autopeft.search_space.routers.mixing import Decision, chosen, exact, owned_only

        tokens, owned = x.shape[1], call.router.owned_experts
        # At least float32, as all routers are: a gate that is rounded sends a token elsewhere. Experts come before
        # tokens until the gates are ready: over a last axis as short as theirs a softmax takes ten times as long.
        logits = self.logits(mixture, p, exact(x), call)
        if call.max_over_slots("router_noise"):
            logits = call.noisy(logits.mT, "router_noise").mT
        logits = owned_only(logits, call)
        weights, probabilities = self.weights(logits)
        if self.chooses:
            sent = chosen(self.order(p, weights.detach(), call), probabilities.detach(), call)
        else:
            sent = owned.bool()[..., None].expand_as(probabilities)
        gates = self.shares(logits, weights, sent)
        if min(call.min_over_slots("top_k"), call.min_over_slots("experts")) < 2 or call.min_over_slots("top_p") < 1.0:
            # One expert alone keeps its probability, from which the router learns.
            gates = (weights * sent).where(sent.sum(1, keepdim=True) == 1, gates)
        # Texts count all alike, and so do tokens, but for padding.
        counted = None if self.per_text else call.router.tokens.counted()
        decision = Decision.of(logits, probabilities, sent, owned, counted)
        penalty = self.penalty(p, decision, call)
        call.router.last = decision.routing(penalty, mixture.shared_experts, call.router.seen is not None)
        gates = gates.mT
        if gates.shape[1] != tokens:  # one decision for a text
            gates = gates.repeat_interleave(tokens // gates.shape[1], 1)
        call.router.tokens.lead(call.bank, gates)
        return gates

    def logits(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        """Return z: [K, E, M], or [K, E, N] for decisions about texts. x: [K, M, D_in] in float32 at least."""
        raise TypeError(f"a router {self.name!r} has no logits")

    def weights(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return what gates are made of and the probabilities, which sum to 1 over the experts, each [K, E, M]."""
        probabilities = logits.softmax(1)
        return probabilities, probabilities

    def order(self, p: Values, weights: Tensor, call: Call) -> Tensor:
        """Return what the `top_k` experts are the largest of: [K, E, M]. weights: without gradients."""
        return weights

    def shares(self, logits: Tensor, weights: Tensor, sent: Tensor) -> Tensor:
        """Return gates [K, E, M] that sum to 1 over the experts that a token is sent to. sent: [K, E, M] bool."""
        return logits.masked_fill(~sent, float("-inf")).softmax(1)

    def penalty(self, p: Values, decision: Decision, call: Call) -> Tensor:
        """Return what is added to each slot's loss: [K]; see `Mixture`."""
        penalty = decision.count.new_zeros(decision.count.shape)
        if self.balanced and call.max_over_slots("balance") > 0:
            penalty = call.constants["balance"] * self.imbalance(p, decision)
        if "z_loss" in self.uses and call.max_over_slots("z_loss") > 0:
            square = decision.over_tokens(decision.logits.logsumexp(1, keepdim=True).square())[:, 0]
            penalty = penalty + call.constants["z_loss"] * square / decision.total
        return penalty

    def imbalance(self, p: Values, decision: Decision) -> Tensor:
        """Return E * sum of f_e P_e: [K] (Fedus et al. 2022, Switch Transformers, equation 4)."""
        probabilities = decision.over_tokens(decision.probabilities)
        return (decision.load * probabilities).sum(-1) * (decision.count / decision.total)


def one_row_each(mixture: RoutedSpec, *widths: int) -> Parameter:
    """Return W_r: [E, *widths] with a row for each expert, drawn by itself."""
    return Parameter(shape=(mixture.experts, *widths), init="small_normal", per_expert=True)


def one_bias_each(mixture: RoutedSpec) -> Parameter:
    """Return b: [E], zero at the start."""
    return Parameter(shape=(mixture.experts,), decay=False, per_expert=True)
