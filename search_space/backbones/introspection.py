"""Find the adapter sites of a transformers model by looking at its module names and shapes.

Nothing here imports torch or transformers: a model is anything with ``named_modules()``,
``named_parameters()`` and, where it has one, a ``config``. Names are matched per naming convention, not per
class, and the result is verified: every linear of every layer has exactly one role, and reads or writes the
residual stream if its role does. Other models raise UnknownBackboneError, whose message shows how to name the modules
by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from posixpath import commonprefix
from typing import Any

from autopeft.search_space.backbones.attention import is_causal, uses_attention_interface
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Backbone, Site
from autopeft.search_space.backbones.names import parent, role_of, within
from autopeft.search_space.backbones.storage import num_elements, quantization_of
from autopeft.search_space.spelling import did_you_mean

_WRITE_RESIDUAL = ("attn.o", "mlp.down")
# Task heads, as children of a model: newly initialised, so they are always trained.
_HEADS = ("pre_classifier", "classifier", "score", "qa_outputs")
# Keys of ``modules`` whose paths start at the model's root; those of linear roles start at a layer.
_ROOT_KEYS = ("layers", "embed", "head")

_BY_HAND = """\
Name its modules in the study file, linear layers by their path within a layer ("embed" and "head" are optional):
    model:
      modules:
        layers: {layers}
        attn.q: attention.query
        attn.o: attention.out
        mlp.up: mlp.fc1  # and so on"""


class UnknownBackboneError(ValueError):
    """The sites of a model could not be found, or the modules named by hand do not fit it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """One member of a list of modules; the paths in ``modules`` and ``linears`` are relative to it."""

    path: str
    modules: dict[str, Any]
    linears: dict[str, tuple[int, int]]  # (in_features, out_features)


_Stacks = Mapping[str, Sequence[_Layer]]


def describe(
    model: Any,
    *,
    id: str,
    revision: str | None = None,
    modules: Mapping[str, str] | None = None,
    made: Sequence[str] = (),
) -> Backbone:
    """Describe ``model``: its sites, sizes and task head.

    ``modules`` names modules that cannot be found: ``"layers"`` is the dotted path of the list of layers, a linear
    role (``"attn.q"``, ``"mlp.down"``, ...) a path within each layer, ``"embed"`` and ``"head"`` the paths of
    the word embedding and of a task head. If it names a linear role, only the named roles have sites. ``made``: paths
    of further modules that are not in the checkpoint and belong to the head. Raises UnknownBackboneError if the sites
    cannot be found or ``modules`` does not fit the model.
    """
    tree = dict(model.named_modules())
    stacks = _stacks(tree)
    by_hand = dict(modules or {})
    _check_by_hand(by_hand, tree, stacks)
    try:
        stack = by_hand.get("layers") or _find_stack(stacks, _input_embedding(model, tree))
        layers = stacks[stack]
        named = {role: by_hand[role] for role in LINEAR_ROLES if role in by_hand}
        roles = [named] * len(layers) if named else _match_all(layers)
        width = _residual_width(layers, roles)
    except UnknownBackboneError as error:
        raise UnknownBackboneError(_not_found_message(model, stacks, str(error))) from None

    config: Any = getattr(model, "config", None)
    # The language part of a multimodal model has its own config.
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_heads = getattr(text_config, "num_attention_heads", None)
    before, after = _outer_sites(model, tree, stack, width, by_hand.get("embed"))
    inside = [
        site
        for index, (layer, paths) in enumerate(zip(layers, roles, strict=True))
        for site in _layer_sites(index, layer, paths, width, num_heads, tree)
    ]

    sizes = {name: num_elements(parameter) for name, parameter in model.named_parameters()}
    heads = (by_hand["head"],) if "head" in by_hand else tuple(path for path in tree if path in _HEADS)
    # Without labels, transformers has an Identity as the head: nothing to train.
    heads = tuple(path for path in (*made, *heads) if any(within(name, [path]) for name in sizes))
    num_head_params = sum(size for name, size in sizes.items() if within(name, heads))
    num_params = sum(sizes.values()) - num_head_params
    quantization = quantization_of(config)
    # Without quantisation, the model itself is a site: where all of its weights can be trained.
    whole = [replace(_site("backbone", None, "backbone", "", model, (width, width)), num_params=num_params)]
    attention = {site.attention_module: tree[site.attention_module] for site in inside if site.attention_module}
    return Backbone(
        id=id,
        revision=revision,
        family=getattr(config, "model_type", None) or type(model).__name__,
        sites=(*before, *inside, *after, *(whole if quantization is None else ())),
        hidden_size=width,
        num_layers=len(layers),
        num_params=num_params,
        head_modules=heads,
        num_head_params=num_head_params,
        causal=bool(attention) and all(is_causal(module, model, text_config) for module in attention.values()),
        quantization=quantization,
    )


def _shape(module: Any) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a linear, else ``None``. GPT-2's Conv1D calls them nx and nf."""
    # Attributes, not the weight's shape: a quantised linear keeps its weight packed.
    for names in (("in_features", "out_features"), ("nx", "nf")):
        if all(isinstance(getattr(module, name, None), int) for name in names):
            return getattr(module, names[0]), getattr(module, names[1])
    return None


def _stacks(tree: Mapping[str, Any]) -> dict[str, list[_Layer]]:
    """Return every list of modules (children named 0, 1, ...) that contains linears, by path."""
    members: dict[str, dict[str, Any]] = {}
    for path, module in tree.items():
        parts = path.split(".")
        for depth in range(1, len(parts)):
            if parts[depth].isdecimal():
                inside = members.setdefault(".".join(parts[: depth + 1]), {})
                if name := ".".join(parts[depth + 1 :]):
                    inside[name] = module
    stacks: dict[str, list[_Layer]] = {}
    for path, inside in members.items():
        linears = {name: shape for name, module in inside.items() if (shape := _shape(module))}
        stacks.setdefault(parent(path), []).append(_Layer(path=path, modules=inside, linears=linears))
    return {path: layers for path, layers in stacks.items() if any(layer.linears for layer in layers)}


def _find_stack(stacks: _Stacks, embedding: str | None) -> str:
    """Return the list of layers with attention; of several, the one nearest to the embedding of the words."""
    fits = [path for path, layers in stacks.items() if "attn.o" in map(role_of, layers[0].linears)]
    if not fits:
        raise UnknownBackboneError("no list of layers has an attention output projection with a known name")
    if len(fits) > 1 and embedding is not None:
        shared = {path: len(commonprefix([path.split("."), embedding.split(".")])) for path in fits}
        fits = [path for path in fits if shared[path] == max(shared.values())]
    if len(fits) > 1:
        raise UnknownBackboneError(f"several lists of layers have attention: {', '.join(fits)}")
    return fits[0]


def _match_all(layers: Sequence[_Layer]) -> list[dict[str, str]]:
    """Return the path of the linear of each role, per layer.

    Raises UnknownBackboneError for a linear without a role, a role with two linears, or a role without one. Layers with
    experts have no roles of the mlp.
    """
    matched, problems = [], []
    for layer in layers:
        found: dict[str, str] = {}
        experts = _parents_of_experts(layer)
        for path in layer.linears:
            if within(path, experts):
                continue
            role = role_of(path)
            if role is None:
                problems.append(f"{layer.path}.{path} has no known role")
            elif role in found:
                problems.append(f"{layer.path} has two linear layers for {role}, {found[role]} and {path}")
            else:
                found[role] = path
        needed: tuple[str, ...] = ("attn.qkv",) if "attn.qkv" in found else ("attn.q", "attn.k", "attn.v")
        needed = (*needed, "attn.o") if experts else (*needed, "attn.o", "mlp.up", "mlp.down")
        missing = [role for role in needed if role not in found]
        if missing:
            problems.append(f"{layer.path} has no linear layer for {', '.join(missing)}")
        matched.append(found)
    if problems:
        raise UnknownBackboneError("; ".join(problems[:4]) + ("; ..." if len(problems) > 4 else ""))
    return matched


def _parents_of_experts(layer: _Layer) -> list[str]:
    """Return the paths of the modules whose experts share one weight [E, ...] instead of a linear each.

    No adapter fits such an expert, and other linears of that module (routers, shared experts) see a part of the mlp.
    """
    return [
        parent(path) or path
        for path, module in layer.modules.items()
        if not hasattr(module, "kernel_size")  # of a convolution
        and any(parameter.dim() == 3 for _, parameter in module.named_parameters(recurse=False))
    ]


def _residual_width(layers: Sequence[_Layer], roles: Sequence[Mapping[str, str]]) -> int:
    """Return the hidden size: the common width of all linears that read or write the residual stream.

    Raises UnknownBackboneError if they differ.
    """
    widths: dict[int, str] = {}
    for layer, paths in zip(layers, roles, strict=True):
        for role, path in paths.items():
            width = layer.linears[path][1 if role in _WRITE_RESIDUAL else 0]
            widths.setdefault(width, f"{layer.path}.{path} ({role})")
    if len(widths) > 1:
        seen = ", ".join(f"{width} at {where}" for width, where in widths.items())
        raise UnknownBackboneError(f"the linear layers have different hidden sizes: {seen}")
    return next(iter(widths))


def _is_norm(module: Any, width: int) -> bool:
    shape = getattr(getattr(module, "weight", None), "shape", ())
    return "norm" in type(module).__name__.lower() and tuple(shape) == (width,)


def _norm_site(name: str, layer: int | None, path: str, module: Any, width: int) -> Site:
    classes = [parent.__name__ for parent in type(module).__mro__]
    known = "LayerNorm" in classes or classes[0].endswith("RMSNorm")
    return replace(_site(name, layer, "norm", path, module, (width, width)), known_norm=known)


def _is_table(module: Any) -> bool:
    return hasattr(module, "num_embeddings")


def _site(name: str, layer: int | None, role: str, path: str, module: Any, shape: tuple[int, int]) -> Site:
    """Return a site whose adapters read and change the same module."""
    return Site(
        name=name,
        layer=layer,
        role=role,
        module=path,
        input_module=path,
        in_features=shape[0],
        out_features=shape[1],
        bias=getattr(module, "bias", None) is not None,
    )


def _layer_sites(
    index: int,
    layer: _Layer,
    paths: Mapping[str, str],
    width: int,
    num_heads: int | None,
    tree: Mapping[str, Any],
) -> list[Site]:
    def whole(role: str, first: Site, last: Site, **attention: Any) -> Site:
        return Site(
            name=f"{name}.{role}",
            layer=index,
            role=role,
            module=last.module,
            input_module=first.module,
            in_features=first.in_features,
            out_features=last.out_features,
            bias=last.bias,
            **attention,
        )

    name = f"layers.{index}"
    linears = {
        role: replace(
            _site(f"{name}.{role}", index, role, f"{layer.path}.{path}", layer.modules[path], layer.linears[path]),
            hidden_size=width,
        )
        for role in LINEAR_ROLES
        if (path := paths.get(role)) is not None
    }
    sites = list(linears.values())
    query = linears.get("attn.q") or linears.get("attn.qkv")
    if query and "attn.o" in linears:
        sites.append(
            whole(
                "attn",
                query,
                linears["attn.o"],
                attention_module=parent(query.module),
                attention_interface=uses_attention_interface(tree[parent(query.module)]),
                **_head_geometry(linears, num_heads),
            )
        )
    first = linears.get("mlp.gate") or linears.get("mlp.up")
    if first and "mlp.down" in linears:
        sites.append(whole("mlp", first, linears["mlp.down"]))
    # A norm inside the attention works on queries or keys (Qwen3, Gemma3), not on the residual stream.
    inner = {parent(query.module)} - {layer.path} if query else set()
    norms = [
        path
        for path, module in layer.modules.items()
        if _is_norm(module, width) and not within(f"{layer.path}.{path}", inner)
    ]
    sites += [
        _norm_site(f"{name}.norm.{j}", index, f"{layer.path}.{path}", layer.modules[path], width)
        for j, path in enumerate(norms)
    ]
    return sites


def _head_geometry(linears: Mapping[str, Site], num_heads: int | None) -> dict[str, int]:
    """Return head size and number of key/value heads, from the shapes and the number of query heads."""
    query_width = linears["attn.o"].in_features
    if "attn.k" in linears:
        key_width = linears["attn.k"].out_features
    elif "attn.qkv" in linears:
        key_width = (linears["attn.qkv"].out_features - query_width) // 2
    else:
        return {}
    if num_heads is None:
        return {}
    head_dim = query_width // num_heads
    return {"num_key_value_heads": key_width // head_dim, "head_dim": head_dim}


def _outer_sites(
    model: Any, tree: Mapping[str, Any], stack: str, width: int, embed: str | None
) -> tuple[list[Site], list[Site]]:
    """Return the sites before the layers and the sites after them."""
    before: list[Site] = []
    entrance = embed or _input_embedding(model, tree)
    # The input of a vision model is a patch projection, not an embedding table.
    if entrance is not None and _is_table(tree[entrance]):
        shape = (tree[entrance].num_embeddings, tree[entrance].embedding_dim)
        before.append(_site("embed", None, "embed", entrance, tree[entrance], shape))
    # Only norms in the module that contains the layers and the embedding: norms of a pre-training head (BERT's
    # ``cls``) or of another modality are not on this residual stream. Of several, take the nearest to the layers;
    # modules are registered in the order in which they run.
    scope = parent(stack)
    while scope and not (entrance and within(entrance, [scope])):
        scope = parent(scope)
    order = [path for path in tree if not scope or within(path, [scope])]
    norms = [path for path in order if _is_norm(tree[path], width) and not within(path, [stack])]
    ahead = [path for path in norms if order.index(path) < order.index(stack)]
    before += [_norm_site("norm.embed", None, path, tree[path], width) for path in ahead[-1:]]
    after = [_norm_site("norm.final", None, path, tree[path], width) for path in norms[len(ahead) :][:1]]
    return before, after


def _input_embedding(model: Any, tree: Mapping[str, Any]) -> str | None:
    found = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return next((path for path, module in tree.items() if module is found), None)


def _check_by_hand(by_hand: Mapping[str, str], tree: Mapping[str, Any], stacks: _Stacks) -> None:
    """Raise UnknownBackboneError with all unknown keys and all paths that do not exist."""
    keys = (*_ROOT_KEYS, *LINEAR_ROLES)
    problems = [
        f"{key!r} is not one of {', '.join(keys)}{did_you_mean(key, keys)}" for key in by_hand if key not in keys
    ]
    tables = [path for path, module in tree.items() if _is_table(module)]
    for key, what, known in (
        ("layers", "list of layers", stacks),
        ("embed", "embedding", tables),
        ("head", "module", tree),
    ):
        if key in by_hand and by_hand[key] not in known:
            problems.append(f"{key!r}: no {what} {by_hand[key]!r}{did_you_mean(by_hand[key], known)}")
    roles = [role for role in LINEAR_ROLES if role in by_hand]
    if roles and "layers" not in by_hand:
        problems.append("'layers' is missing: the path of the list of layers, to which the paths of roles are relative")
    for role in roles:
        path, layers = by_hand[role], stacks.get(by_hand.get("layers", ""), ())
        absent = [layer for layer in layers if path not in layer.linears]
        if absent:
            problems.append(
                f"{role!r}: no linear layer {path!r} in {len(absent)} of {len(layers)} layers, "
                f"first in {absent[0].path}{did_you_mean(path, absent[0].linears)}"
            )
    if problems:
        raise UnknownBackboneError("the modules named by hand do not fit the model:\n  " + "\n  ".join(problems))


def _not_found_message(model: Any, stacks: _Stacks, problem: str) -> str:
    """Return the message that lists the model's modules and shows how to name them by hand."""
    seen = [
        f"    {path} ({len(layers)} layers): "
        + ", ".join(f"{name} {shape[0]}->{shape[1]}" for name, shape in layers[0].linears.items())
        for path, layers in stacks.items()
    ]
    return "\n".join(
        [
            f"cannot find the adapter sites of {type(model).__name__}: {problem}.",
            "Lists of layers found, with the linear layers of their first member:",
            *(seen or ["    none"]),
            _BY_HAND.format(layers=next(iter(stacks), "encoder.blocks")),
        ]
    )
