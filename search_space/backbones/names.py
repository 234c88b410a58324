"""The names that transformers' models give the linear layers of each role."""

from __future__ import annotations

from collections.abc import Iterable

# Ends of a linear's path within its layer. The longest match wins: BERT's "attention.output.dense" is not
# its "output.dense".
_ENDINGS = {
    "attn.q": ("self.query", "attention.query", "q_lin", "q_proj", "query_proj", "attn.q"),
    "attn.k": ("self.key", "attention.key", "k_lin", "k_proj", "key_proj", "attn.k"),
    "attn.v": ("self.value", "attention.value", "v_lin", "v_proj", "value_proj", "attn.v"),
    "attn.qkv": ("attn.c_attn", "query_key_value", "qkv_proj", "Wqkv"),
    "attn.o": (
        "attention.output.dense", "out_lin", "o_proj", "attn.c_proj", "attn.o", "attn.Wo",
        *(f"{attention}.dense" for attention in ("attention", "self_attention", "self_attn")),
        *(f"{attention}.out_proj" for attention in ("attention", "attn", "self_attn")),
    ),
    "mlp.gate": ("gate_proj",),
    # The first linear of a gated mlp may hold the gate too (gate_up_proj, Wi).
    "mlp.up": (
        "intermediate.dense", "lin1", "up_proj", "fc1", "c_fc", "fc_in", "dense_h_to_4h", "gate_up_proj", "mlp.Wi",
    ),
    "mlp.down": ("output.dense", "lin2", "down_proj", "fc2", "mlp.c_proj", "fc_out", "dense_4h_to_h", "mlp.Wo"),
}  # fmt: skip


def role_of(path: str) -> str | None:
    """Return the role of a linear by its path within a layer, or None."""
    fits = [
        (len(ending), role)
        for role, endings in _ENDINGS.items()
        for ending in endings
        if path == ending or path.endswith(f".{ending}")
    ]
    return max(fits)[1] if fits else None


def within(name: str, paths: Iterable[str]) -> bool:
    """Return whether a dotted name is one of `paths` or lies below one."""
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def parent(path: str) -> str:
    """Return the path of the module that contains the one at `path`; "" for the model itself."""
    return path.rpartition(".")[0]
