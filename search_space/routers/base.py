"""Interface of a router: fields that it reads, parameters, costs and the mixing of the experts.

Notation: K slots, N texts of T tokens, M = N * T, E routed experts, S shared experts, D_in and D_out features, C
decisions (one per token, C = M, or one per text, C = N). Like those of an adapter, the forward functions are
slot-batched and import torch inside. The tests check the shapes in the docstrings of `Router` at every call of every
router (tests/support/shapes.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from autopeft.search_space.backbones.backbone import Site
from autopeft.search_space.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values
    from autopeft.search_space.routers.mixing import Decision, RoutedSpec


class Router:
    """Weighting of the experts of a mixture. Instances have no state; `call.router` holds the state between calls.

    A router with gates implements `logits`, from which `decide` computes the gates, or overrides `decide`. A router
    that does not compute a weighted sum of the experts' outputs overrides `mix`.
    """

    __slots__ = ()

    #: Name in the field `Mixture.router`.
    name: ClassVar[str]
    #: Where in the paper the mechanism is defined.
    source: ClassVar[str]
    #: One line for tables.
    summary: ClassVar[str]
    #: Fields of `Mixture` for routers that this router reads; the others have no effect.
    uses: ClassVar[tuple[str, ...]] = ()
    #: Whether it makes one decision per text.
    per_text: ClassVar[bool] = False
    #: Whether a decision about a token depends on later tokens of the text.
    reads_ahead: ClassVar[bool] = False
    #: Whether it reads the last hidden states of the model without adapters, which takes an additional forward pass.
    first_pass: ClassVar[bool] = False
    #: Whether the experts must be pretrained LoRAs (`Mixture.given`).
    between_given: ClassVar[bool] = False
    #: Whether the gates of all experts are equal for every input.
    constant: ClassVar[bool] = False
    #: Whether it sums the experts' outputs weighted by gates. Shared experts, whose gates are 1, require this.
    has_gates: ClassVar[bool] = True
    #: Whether other sites can use its gates.
    can_lead: ClassVar[bool] = True
    #: Whether it mixes the experts' matrices into one LoRA; the experts must then be LoRAs of the same rank.
    mixes_parameters: ClassVar[bool] = False

    @property
    def chooses(self) -> bool:
        """Whether it sends a token to at most `top_k` of the experts."""
        return "top_k" in self.uses

    @property
    def balanced(self) -> bool:
        """Whether it has a loss that balances the load of the experts."""
        return "balance" in self.uses

    @property
    def needs_domains(self) -> bool:
        """Whether it reads the domain of a text."""
        return "tasks" in self.uses

    @property
    def follows(self) -> bool:
        """Whether it uses the gates of the mixture at another site."""
        return "leader" in self.uses

    # Declaration

    def problems(self, mixture: RoutedSpec) -> Iterator[str]:
        """Yield the reasons why the router cannot serve a mixture with these fields at any site."""
        if self.mixes_parameters and mixture.expert.kind != "lora":
            yield f"router {self.name!r} mixes the matrices of LoRAs and does not support {mixture.expert.kind}"
        if not self.has_gates and mixture.shared_experts:
            yield f"router {self.name!r} does not support shared_experts"

    def fits(self, mixture: RoutedSpec, site: Site) -> bool:
        """Return whether the router can serve a mixture at `site`."""
        return True

    def parameters(self, mixture: RoutedSpec, site: Site) -> dict[str, Parameter]:
        """Return the router's tensors by name; the names start with "router", those of experts do not."""
        return {}

    def num_chosen(self, mixture: RoutedSpec) -> int:
        """Return the largest number of routed experts per token."""
        return min(mixture.top_k, mixture.experts) if self.chooses else mixture.experts

    def own_flops_per_token(self, mixture: RoutedSpec, site: Site) -> int:
        """Return the FLOPs of the router alone; a decision per text counts as zero."""
        return 0

    def flops_per_token(self, mixture: RoutedSpec, site: Site) -> int:
        """Return the FLOPs of the mixture; see `AdapterSpec.flops_per_token`."""
        experts: int = mixture.num_active * mixture.gated.flops_per_token(site)
        return self.own_flops_per_token(mixture, site) + experts

    # At run time

    def mix(self, mixture: RoutedSpec, p: Values, x: Tensor, y: Tensor | None, call: Call) -> Tensor:
        """Return the change that the experts make to the site's output y or, if y is None, to its input x.

        x: [K, M, D_in], y: [K, M, D_out]. Returns [K, M, D_out], where D_out = D_in if y is None.
        """
        from autopeft.search_space.routers.mixing import expert_values, weighted

        return weighted(mixture, expert_values(p), self.gates(mixture, p, x, call), x, y, call)

    def gates(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        """Return the gates of all experts, shared experts first, in the bank's dtype.

        x: [K, M, D_in], in the dtype of the bank or of the backbone. Returns [K, M, S + E].
        """
        from autopeft.search_space.routers.mixing import equal_gates, with_shared

        call.router.last = None
        gates = equal_gates(x.shape[1], call) if call.router.averaged else self.decide(mixture, p, x, call)
        return with_shared(gates.to(call.bank.dtype), mixture.shared_experts)

    def decide(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        """Return the gates of the routed experts; store the `Routing` and the gates for followers in `call.router`.

        x: [K, M, D_in]. Returns [K, M, E].
        """
        from autopeft.search_space.routers.mixing import Decision, chosen, exact, owned_only

        tokens, owned = x.shape[1], call.router.owned_experts
        # Routers compute in float32 at least, because rounding would send a token to another expert. The axis of the
        # experts precedes that of the tokens, because a softmax over a short last axis takes ten times as long.
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
            # The gate of a single expert is its probability, so that the router has a gradient.
            gates = (weights * sent).where(sent.sum(1, keepdim=True) == 1, gates)
        # All texts have equal weight, and so do all tokens except padding.
        counted = None if self.per_text else call.router.tokens.counted()
        decision = Decision.of(logits, probabilities, sent, owned, counted)
        penalty = self.penalty(p, decision, call)
        call.router.last = decision.routing(penalty, mixture.shared_experts, call.router.seen is not None)
        gates = gates.mT
        if gates.shape[1] != tokens:  # one decision per text
            gates = gates.repeat_interleave(tokens // gates.shape[1], 1)
        call.router.tokens.lead(call.bank, gates)
        return gates

    def logits(self, mixture: RoutedSpec, p: Values, x: Tensor, call: Call) -> Tensor:
        """Return the logits z of the decisions. x: [K, M, D_in], in float32 at least. Returns [K, E, C]."""
        raise TypeError(f"router {self.name!r} does not compute logits")

    def weights(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights that become gates, and the probabilities, which sum to 1 over the experts.

        logits: [K, E, C]. Returns weights and probabilities, each [K, E, C].
        """
        probabilities = logits.softmax(1)
        return probabilities, probabilities

    def order(self, p: Values, weights: Tensor, call: Call) -> Tensor:
        """Return the scores by which the `top_k` experts are chosen, largest first.

        weights: [K, E, C], detached. Returns [K, E, C].
        """
        return weights

    def shares(self, logits: Tensor, weights: Tensor, sent: Tensor) -> Tensor:
        """Return gates that sum to 1 over the experts that a token is sent to.

        logits: [K, E, C], weights: [K, E, C], sent: [K, E, C] bool. Returns [K, E, C].
        """
        return logits.masked_fill(~sent, float("-inf")).softmax(1)

    def penalty(self, p: Values, decision: Decision, call: Call) -> Tensor:
        """Return the term that is added to the loss of each slot; see `Mixture`. Returns [K]."""
        penalty = decision.count.new_zeros(decision.count.shape)
        if self.balanced and call.max_over_slots("balance") > 0:
            penalty = call.constants["balance"] * self.imbalance(p, decision)
        if "z_loss" in self.uses and call.max_over_slots("z_loss") > 0:
            square = decision.over_tokens(decision.logits.logsumexp(1, keepdim=True).square())[:, 0]
            penalty = penalty + call.constants["z_loss"] * square / decision.total
        return penalty

    def imbalance(self, p: Values, decision: Decision) -> Tensor:
        """Return E * sum of f_e P_e (Fedus et al. 2022, Switch Transformers, equation 4). Returns [K]."""
        probabilities = decision.over_tokens(decision.probabilities)
        return (decision.load * probabilities).sum(-1) * (decision.count / decision.total)


def one_row_each(mixture: RoutedSpec, *widths: int) -> Parameter:
    """Return the declaration of W_r: [E, *widths], whose rows are drawn independently, one per expert."""
    return Parameter(shape=(mixture.experts, *widths), init="small_normal", per_expert=True)


def one_bias_each(mixture: RoutedSpec) -> Parameter:
    """Return the declaration of b: [E], which starts at zero."""
    return Parameter(shape=(mixture.experts,), decay=False, per_expert=True)
