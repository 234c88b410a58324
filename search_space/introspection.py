"""Find the adapter sites of a transformers model by looking at its module names and shapes.

Nothing here imports torch or transformers: a model is anything with ``named_modules()``, ``named_parameters()``
and, where it has one, a ``config``. Names are matched per naming convention, not per class, and the result is
verified: every linear of every layer has exactly one role, and reads or writes the residual stream where its role
says so. A model that fails this is refused, with the way to name its modules by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .backbone import LINEAR_ROLES, Backbone, Site, did_you_mean

# How a linear's path within its layer ends. The longest ending wins: BERT's "attention.output.dense" is not
# its "output.dense".
_ENDINGS = {
    "attn.q": ("self.query", "attention.query", "q_lin", "q_proj"),
    "attn.k": ("self.key", "attention.key", "k_lin", "k_proj"),
    "attn.v": ("self.value", "attention.value", "v_lin", "v_proj"),
    "attn.qkv": ("attn.c_attn",),
    "attn.o": ("attention.output.dense", "out_lin", "o_proj", "attn.c_proj"),
    "mlp.gate": ("gate_proj",),
    "mlp.up": ("intermediate.dense", "lin1", "up_proj", "fc1", "c_fc"),
    "mlp.down": ("output.dense", "lin2", "down_proj", "fc2", "mlp.c_proj"),
}
_READ_RESIDUAL = ("attn.q", "attn.k", "attn.v", "attn.qkv", "mlp.gate", "mlp.up")
_WRITE_RESIDUAL = ("attn.o", "mlp.down")
# Children of a model with a task head: newly initialised, so they must train whatever the adapters are.
_HEADS = ("pre_classifier", "classifier", "score", "qa_outputs")
# Paths from the model's root in ``modules``; the linear roles are paths from a layer.
_ROOT_KEYS = ("layers", "embed", "head")

_BY_HAND = """\
Name its modules by hand, the linears by their path within a layer ("embed" and "head" may be named too):
    describe(model, id=..., modules={{"layers": "{layers}", "attn.q": "attention.query",
                                     "attn.o": "attention.out", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}})"""


class UnknownBackboneError(ValueError):
    """The sites of a model could not be found, or the modules named by hand do not fit it."""


def describe(model: Any, *, id: str, revision: str | None = None,
             modules: Mapping[str, str] | None = None) -> Backbone:
    """Describe ``model``: its sites, sizes and task head.

    ``modules`` names what cannot be found: ``"layers"`` is the dotted path of the list of layers, a linear role
    (``"attn.q"``, ``"mlp.down"``, ...) a path within each layer, ``"embed"`` and ``"head"`` the paths of the word
    embedding and of a task head. Once one linear role is named, only the roles named have sites.
    """
    tree = dict(model.named_modules())
    by_hand = dict(modules or {})
    _check_by_hand(tree, by_hand)
    stack = by_hand.get("layers") or _find_stack(model, tree)
    layers = [_below(tree, path) for path in _stacks(tree)[stack]]
    named = {role: by_hand[role] for role in LINEAR_ROLES if role in by_hand}
    linears = [named] * len(layers) if named else _match_all(model, tree, stack, layers)
    width = _residual_width(model, stack, layers, linears)

    config = getattr(model, "config", None)
    # The language half of a model of several modalities has its own config.
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_heads = getattr(text_config, "num_attention_heads", None)
    layer_sites = [site for index, (inside, paths) in enumerate(zip(layers, linears, strict=True))
                   for site in _layer_sites(index, f"{stack}.{index}", inside, paths, width, num_heads)]

    heads = _heads(model, tree, by_hand.get("head"))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    num_head_params = sum(size for name, size in sizes.items() if _within(name, heads))
    before, after = _outer_sites(model, tree, stack, width, by_hand.get("embed"))
    attention = [tree[site.attention_module] for site in layer_sites if site.attention_module is not None]
    return Backbone(
        id=id,
        revision=revision,
        family=getattr(config, "model_type", None) or type(model).__name__,
        sites=(*before, *layer_sites, *after),
        hidden_size=width,
        num_layers=len(layers),
        num_params=sum(sizes.values()) - num_head_params,
        head_modules=heads,
        num_head_params=num_head_params,
        causal=bool(attention) and all(getattr(module, "is_causal", False) for module in attention),
    )


def _below(tree: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The modules under ``path``, by their path within it."""
    prefix = f"{path}." if path else ""
    return {name.removeprefix(prefix): module for name, module in tree.items()
            if name.startswith(prefix) and name != path}


def _within(name: str, paths: Iterable[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _shape(module: Any) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear, else ``None``. GPT-2's Conv1D calls them nx and nf."""
    # Attributes, not the weight's shape: a quantised linear keeps its weight packed.
    for names in (("in_features", "out_features"), ("nx", "nf")):
        if all(isinstance(getattr(module, name, None), int) for name in names):
            return getattr(module, names[0]), getattr(module, names[1])
    return None


def _linears(layer: Mapping[str, Any]) -> list[str]:
    return [path for path, module in layer.items() if _shape(module) is not None]


def _stacks(tree: Mapping[str, Any]) -> dict[str, list[str]]:
    """Every list of modules (children named 0, 1, ...) with linears inside, and the paths of its members."""
    stacks: dict[str, list[str]] = {}
    for path in tree:
        if path.rpartition(".")[2].isdecimal():
            stacks.setdefault(_parent(path), []).append(path)
    return {path: members for path, members in stacks.items() if _linears(_below(tree, members[0]))}


def _role(path: str) -> str | None:
    fits = [(len(ending), role) for role, endings in _ENDINGS.items() for ending in endings
            if path == ending or path.endswith(f".{ending}")]
    return max(fits)[1] if fits else None


def _find_stack(model: Any, tree: Mapping[str, Any]) -> str:
    fits = [path for path, members in _stacks(tree).items()
            if "attn.o" in {_role(linear) for linear in _linears(_below(tree, members[0]))}]
    if len(fits) != 1:
        problem = f"several lists of layers have attention: {', '.join(fits)}" if fits else \
            "no list of layers has an attention output projection with a known name"
        raise _unknown(model, tree, problem)
    return fits[0]


def _match_all(model: Any, tree: Mapping[str, Any], stack: str,
               layers: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Per layer, the path of the linear of each role; refuses a layer with a linear too many or too few."""
    matched, problems = [], []
    for index, layer in enumerate(layers):
        found: dict[str, str] = {}
        for path in _linears(layer):
            role = _role(path)
            if role is None:
                problems.append(f"{stack}.{index}.{path} has no known role")
            elif role in found:
                problems.append(f"{stack}.{index} has two linears for {role}: {found[role]} and {path}")
            else:
                found[role] = path
        needed = ("attn.qkv",) if "attn.qkv" in found else ("attn.q", "attn.k", "attn.v")
        missing = [role for role in (*needed, "attn.o", "mlp.up", "mlp.down") if role not in found]
        if missing:
            problems.append(f"{stack}.{index} has no linear for {', '.join(missing)}")
        matched.append(found)
    if problems:
        raise _unknown(model, tree, "; ".join(problems[:4]) + ("; ..." if len(problems) > 4 else ""))
    return matched


def _residual_width(model: Any, stack: str, layers: Sequence[Mapping[str, Any]],
                    linears: Sequence[Mapping[str, str]]) -> int:
    """The hidden size on which every linear at the edge of a sub-layer agrees."""
    widths: dict[int, str] = {}
    for index, (layer, paths) in enumerate(zip(layers, linears, strict=True)):
        for role, path in paths.items():
            shape = _shape(layer[path])
            assert shape is not None, path
            if role in _READ_RESIDUAL or role in _WRITE_RESIDUAL:
                widths.setdefault(shape[0 if role in _READ_RESIDUAL else 1], f"{stack}.{index}.{path} ({role})")
    if len(widths) != 1:
        seen = "; ".join(f"{width} at {where}" for width, where in widths.items())
        raise UnknownBackboneError(f"the linears of {type(model).__name__} disagree on the hidden size: {seen}")
    return next(iter(widths))


def _is_norm(module: Any, width: int) -> bool:
    shape = getattr(getattr(module, "weight", None), "shape", None)
    return "norm" in type(module).__name__.lower() and shape is not None and tuple(shape) == (width,)


def _site(name: str, layer: int | None, role: str, path: str, module: Any, shape: tuple[int, int],
          *, input_module: str | None = None, **attention: Any) -> Site:
    return Site(name=name, layer=layer, role=role, module=path,
                input_module=path if input_module is None else input_module,
                in_features=shape[0], out_features=shape[1],
                bias=getattr(module, "bias", None) is not None, **attention)


def _layer_sites(index: int, prefix: str, layer: Mapping[str, Any], paths: Mapping[str, str], width: int,
                 num_heads: int | None) -> list[Site]:
    name = f"layers.{index}"
    linears = {role: _site(f"{name}.{role}", index, role, f"{prefix}.{paths[role]}", layer[paths[role]],
                           _shape(layer[paths[role]]) or (0, 0))
               for role in LINEAR_ROLES if role in paths}
    sites = list(linears.values())
    query = linears.get("attn.q") or linears.get("attn.qkv")
    output, down = linears.get("attn.o"), linears.get("mlp.down")
    first = linears.get("mlp.gate") or linears.get("mlp.up")
    if query and output:
        sites.append(Site(
            name=f"{name}.attn", layer=index, role="attn", module=output.module, input_module=query.module,
            in_features=query.in_features, out_features=output.out_features, bias=output.bias,
            attention_module=_parent(query.module), **_head_geometry(linears, num_heads)))
    if first and down:
        sites.append(Site(
            name=f"{name}.mlp", layer=index, role="mlp", module=down.module, input_module=first.module,
            in_features=first.in_features, out_features=down.out_features, bias=down.bias))
    # A norm inside the attention works on queries or keys (Qwen3, Gemma3), not on the residual stream.
    inner = {_parent(query.module)} - {prefix} if query else set()
    norms = [path for path, module in layer.items()
             if _is_norm(module, width) and not _within(f"{prefix}.{path}", inner)]
    sites.extend(_site(f"{name}.norm.{j}", index, "norm", f"{prefix}.{path}", layer[path], (width, width))
                 for j, path in enumerate(norms))
    return sites


def _head_geometry(linears: Mapping[str, Site], num_heads: int | None) -> dict[str, int]:
    """Head size and number of key/value heads, from the shapes; the config only says how many query heads."""
    key, fused, query_width = linears.get("attn.k"), linears.get("attn.qkv"), linears["attn.o"].in_features
    if num_heads is None or (key is None and fused is None):
        return {}
    head_dim = query_width // num_heads
    key_width = key.out_features if key else (fused.out_features - query_width) // 2
    return {"head_dim": head_dim, "num_key_value_heads": key_width // head_dim}


def _outer_sites(model: Any, tree: Mapping[str, Any], stack: str, width: int,
                 embed: str | None) -> tuple[list[Site], list[Site]]:
    """The sites ahead of the layers and the sites behind them."""
    before: list[Site] = []
    if embed is None:
        embed = _word_embedding(model, tree)
    if embed is not None:
        rows, columns = tree[embed].weight.shape
        before.append(_site("embed", None, "embed", embed, tree[embed], (rows, columns)))
    # Only norms of the base model: those of a pre-training head (BERT's ``cls``) are not on the residual stream.
    # Of several, the nearest to the layers; modules are registered in the order in which they run.
    base, order = _base(model, tree), list(tree)
    norms = [path for path in order
             if _is_norm(tree[path], width) and (not base or _within(path, [base])) and not _within(path, [stack])]
    ahead = [path for path in norms if order.index(path) < order.index(stack)]
    behind = norms[len(ahead):]
    before += [_site("norm.embed", None, "norm", path, tree[path], (width, width)) for path in ahead[-1:]]
    after = [_site("norm.final", None, "norm", path, tree[path], (width, width)) for path in behind[:1]]
    return before, [*after, _site("backbone", None, "backbone", "", model, (width, width))]


def _base(model: Any, tree: Mapping[str, Any]) -> str:
    """Path of the pre-trained part of a model with a task head; empty where the model itself is that part."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix in tree else ""


def _word_embedding(model: Any, tree: Mapping[str, Any]) -> str | None:
    if not hasattr(model, "get_input_embeddings"):
        return None
    found = model.get_input_embeddings()
    # A vision model answers with its patch projection, which is no table of words.
    if not hasattr(found, "num_embeddings"):
        return None
    return next(path for path, module in tree.items() if module is found)


def _heads(model: Any, tree: Mapping[str, Any], by_hand: str | None) -> tuple[str, ...]:
    named = [by_hand] if by_hand else [path for path in tree if path in _HEADS]
    # With no labels, transformers puts an Identity where the head would be.
    return tuple(path for path in named if any(_within(name, [path]) for name, _ in model.named_parameters()))


def _check_by_hand(tree: Mapping[str, Any], by_hand: Mapping[str, str]) -> None:
    """Refuse keys that mean nothing and paths that do not exist, all of them at once."""
    keys = (*_ROOT_KEYS, *LINEAR_ROLES)
    problems = [f"{key!r} is not one of {', '.join(keys)}{did_you_mean(key, keys)}"
                for key in by_hand if key not in keys]
    stacks = _stacks(tree)
    for key, known in (("layers", stacks), ("embed", tree), ("head", tree)):
        if key in by_hand and by_hand[key] not in known:
            problems.append(f"{key!r}: the model has no {'list of layers' if key == 'layers' else 'module'} "
                            f"{by_hand[key]!r}{did_you_mean(by_hand[key], known)}")
    roles = [role for role in LINEAR_ROLES if role in by_hand]
    if roles and "layers" not in by_hand:
        problems.append("'layers' is missing: the linears' paths are relative to a layer")
    for role in roles:
        members = stacks.get(by_hand.get("layers", ""), [])
        known_linears = {member: _linears(_below(tree, member)) for member in members}
        absent = [member for member, linears in known_linears.items() if by_hand[role] not in linears]
        if absent:
            problems.append(f"{role!r}: no linear {by_hand[role]!r} in {len(absent)} of {len(members)} layers, "
                            f"first in {absent[0]}{did_you_mean(by_hand[role], known_linears[absent[0]])}")
    if problems:
        raise UnknownBackboneError("modules named by hand do not fit:\n  " + "\n  ".join(problems))


def _unknown(model: Any, tree: Mapping[str, Any], problem: str) -> UnknownBackboneError:
    """The error that says what was seen and how to name it."""
    seen = []
    for path, members in _stacks(tree).items():
        layer = _below(tree, members[0])
        linears = ", ".join(f"{linear} {'->'.join(map(str, _shape(layer[linear]) or ()))}"
                            for linear in _linears(layer))
        seen.append(f"    {path} ({len(members)} x {type(tree[members[0]]).__name__}): {linears}")
    return UnknownBackboneError("\n".join([
        f"cannot find the adapter sites of {type(model).__name__}: {problem}.",
        "Lists of layers seen, with the linears of their first layer:",
        *(seen or ["    none"]),
        _BY_HAND.format(layers=next(iter(_stacks(tree)), "encoder.blocks")),
    ]))
