"""A frozen transformer as a search sees it: its size and the sites where adapters may sit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from autopeft.search_space.spelling import did_you_mean

LINEAR_ROLES = ("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
ROLES = (*LINEAR_ROLES, "attn", "mlp", "norm", "embed", "backbone", "head")
#: Layers that a model may have: four times as many as large published ones.
MOST_LAYERS = 500

# Ends of the path of the first norm of a layer.
_AHEAD_OF_ATTENTION = ("ln_1", "input_layernorm", "layernorm_before")
_AFTER_ATTENTION = ("attention.output.LayerNorm", "sa_layer_norm")

# An absent role, the role that stands in for it, and why.
_INSTEAD = {
    "attn.q": ("attn.qkv", "its query, key and value are one linear: use attn.qkv"),
    "attn.k": ("attn.qkv", "its query, key and value are one linear: use attn.qkv"),
    "attn.v": ("attn.qkv", "its query, key and value are one linear: use attn.qkv"),
    "attn.qkv": ("attn.q", "its query, key and value are separate linear layers: use attn.q, attn.k, attn.v"),
    "mlp.gate": ("mlp.up", "its mlp is not gated: use mlp.up"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One place of a backbone where adapters may sit.

    An adapter reads ``x``, the input of the module at ``input_module``, and changes ``y``, the output of the
    module at ``module``. For linears and norms the two are the same module. For the sub-layers ``attn`` and
    ``mlp``, ``x`` enters the first linear and ``y`` leaves the last, before dropout, norm and residual sum.

    Both paths are dotted names for ``model.get_submodule``; the site ``backbone`` is the model itself, whose
    path is ``""``. The input of ``embed`` is token ids: there ``in_features`` is the size of the vocabulary.
    """

    name: str
    layer: int | None
    role: str
    module: str
    input_module: str
    in_features: int
    out_features: int
    bias: bool
    """The module at ``module`` has a bias parameter."""
    attention_module: str | None = None
    """Role ``attn``: the module that computes attention (the first argument of ``attention_interface``)."""
    attention_interface: bool = True
    """Role ``attn``: that module computes attention by a function of transformers' attention interface."""
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    known_norm: bool = True
    """Role ``norm``: the module is a LayerNorm or an RMSNorm, and not one that normalises in another way."""
    num_params: int = 0
    """Role ``backbone``: number of parameters without the task head."""
    hidden_size: int = 0
    """Linears: width of the residual stream; 0 if unknown."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}{did_you_mean(self.role, ROLES)}")


def first_to_run(sites: Sequence[Site]) -> Site | None:
    """Return the site that runs first, of sites of one layer in canonical order.

    None if norms and other sites are among them and the name of the first norm does not tell whether it runs before or
    after the attention.
    """
    norms = [site for site in sites if site.role == "norm"]
    others = [site for site in sites if site.role != "norm"]
    if not (norms and others) or norms[0].module.endswith(_AHEAD_OF_ATTENTION):
        return (norms or others)[0]
    if norms[0].module.endswith(_AFTER_ATTENTION):
        return next((site for site in others if site.role.startswith("attn")), norms[0])
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Backbone:
    """A frozen model, described without torch.

    ``num_params`` excludes the task head (``head_modules``, ``num_head_params``), which is trained with the adapters;
    the ``lm_head`` of a causal language model is frozen and belongs to the backbone. ``causal``: attention is masked
    to earlier tokens, whatever the task. ``quantization``: how bitsandbytes stores the linears, ``nf4``, ``fp4`` or
    ``int8``; such a backbone has no site ``backbone``, because its weights cannot be trained.
    """

    id: str
    revision: str | None
    family: str
    sites: tuple[Site, ...]
    hidden_size: int
    num_layers: int
    num_params: int
    head_modules: tuple[str, ...]
    num_head_params: int
    causal: bool
    quantization: str | None = None
    _site_by_name: Mapping[str, Site] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_site_by_name", {site.name: site for site in self.sites})

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles with at least one site, in the order of ``ROLES``."""
        present = {site.role for site in self.sites}
        return tuple(role for role in ROLES if role in present)

    @property
    def flops_per_token(self) -> int:
        """Operations of the linear layers in one forward pass, per token; a multiply-add counts as two.

        Excluded are the products of attention, which grow with the length of the text, and the output layer.
        """
        return sum(2 * site.in_features * site.out_features for site in self.sites if site.role in LINEAR_ROLES)

    def require(self, roles: Iterable[str]) -> None:
        """Raise ``ValueError`` naming every role that is unknown, or absent from this backbone."""
        present, problems = self.roles, []
        for role in roles:
            if role not in ROLES:
                problems.append(f"unknown role {role!r}{did_you_mean(role, ROLES)}")
            elif role not in present:
                hint = self.instead_of(role)
                problems.append(f"no site has role {role!r}" + (f" ({hint})" if hint else ""))
        if problems:
            raise ValueError(
                f"{self.family} backbone {self.id!r}: {'; '.join(problems)}. Roles present: {', '.join(present)}"
            )

    def instead_of(self, role: str) -> str | None:
        """Return why this backbone lacks a role and the present roles to use instead; None if there is no such role."""
        if role == "backbone" and self.quantization is not None:
            return f"its weights are quantised ({self.quantization}) and stay frozen: leave out what trains them"
        stand_in, hint = _INSTEAD.get(role, ("", ""))
        if role.startswith("mlp") and not any(present.startswith("mlp") for present in self.roles):
            return "its mlp has no linear layer that an adapter fits, as with experts in stacked weights: use attn.*"
        return hint if stand_in in self.roles else None

    def absence(self, roles: Sequence[str]) -> str:
        """Return the message for roles of which this backbone has none."""
        hints = dict.fromkeys(hint for role in roles if (hint := self.instead_of(role)))
        lacking, present = " or ".join(map(repr, roles)), ", ".join(sorted(self.roles))
        return f"this model has no site with role {lacking}; it has {present}" + "".join(f" ({hint})" for hint in hints)

    def select(self, *, roles: Iterable[str] | None = None, layers: Iterable[int] | None = None) -> tuple[Site, ...]:
        """Return the sites with one of these roles in one of these layers, in canonical order; ``None`` means any.

        Sites outside the layers (``embed``, ``norm.final``, ...) are left out if ``layers`` is set. Raises ValueError
        for a role or a layer that the backbone lacks.
        """
        role_filter = None if roles is None else tuple(roles)
        layer_filter = None if layers is None else frozenset(layers)
        if role_filter is not None:
            self.require(role_filter)
        if layer_filter is not None and (outside := layer_filter - set(range(self.num_layers))):
            raise ValueError(f"{self.id!r} has no layers {sorted(outside)}: its layers are 0 to {self.num_layers - 1}")
        return tuple(
            site
            for site in self.sites
            if (role_filter is None or site.role in role_filter)
            and (layer_filter is None or site.layer in layer_filter)
        )

    def site(self, name: str) -> Site:
        """Return the site of this canonical name. Raises ValueError for an unknown name."""
        if name not in self._site_by_name:
            raise ValueError(f"{self.id!r} has no site {name!r}{did_you_mean(name, self._site_by_name)}")
        return self._site_by_name[name]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able mapping from which ``from_dict`` builds an equal backbone."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        if self.quantization is None:  # a later addition, without which older descriptions stay equal
            del own["quantization"]
        return own | {"sites": [asdict(site) for site in self.sites], "head_modules": list(self.head_modules)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Backbone:
        """Return the backbone that ``to_dict`` wrote."""
        return cls(
            **{
                **data,
                "sites": tuple(Site(**site) for site in data["sites"]),
                "head_modules": tuple(data["head_modules"]),
            }
        )
