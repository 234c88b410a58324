"""A handmade backbone and a space over it with every kind of gene, without torch and without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autopeft.search_space import AdapterChoice, Backbone, Choice, Float, Int, OneOf, SearchSpace, Site

BERT_LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")


def encoder(
    num_layers: int = 12,
    hidden_size: int = 768,
    inner_size: int = 3072,
    linears: Sequence[str] = BERT_LINEARS,
    bias: bool = True,
) -> Backbone:
    """Return a backbone with the sites of BERT; by default those of BERT-base."""

    def site(name: str, layer: int | None, role: str, sizes: tuple[int, int], **more: Any) -> Site:
        more = {"bias": bias, **more}
        return Site(name=name, layer=layer, role=role, module=name, input_module=name,
                    in_features=sizes[0], out_features=sizes[1], **more)  # fmt: skip

    width = (hidden_size, hidden_size)
    wide = {
        "mlp.up": (hidden_size, inner_size),
        "mlp.gate": (hidden_size, inner_size),
        "mlp.down": (inner_size, hidden_size),
        "attn.qkv": (hidden_size, 3 * hidden_size),
    }
    heads = {"attention_module": "a", "num_key_value_heads": hidden_size // 8, "head_dim": 8, "bias": False}
    sites = [site("embed", None, "embed", (100, hidden_size), bias=False), site("norm.embed", None, "norm", width)]
    for layer in range(num_layers):
        here = f"layers.{layer}"
        sites += [site(f"{here}.{role}", layer, role, wide.get(role, width)) for role in linears]
        sites += [site(f"{here}.attn", layer, "attn", width, **heads), site(f"{here}.mlp", layer, "mlp", width)]
        sites += [site(f"{here}.norm.{i}", layer, "norm", width) for i in range(2)]
    sites.append(site("backbone", None, "backbone", (1, 1), bias=False, num_params=108_310_272))
    return Backbone(id="encoder", revision=None, family="Bert", sites=tuple(sites), hidden_size=hidden_size,
                    num_layers=num_layers, num_params=108_310_272, head_modules=("classifier",),
                    num_head_params=1538, causal=False)  # fmt: skip


SMALL = encoder(num_layers=3, hidden_size=16, inner_size=24, linears=("attn.q", "attn.v", "mlp.up"))


RANKS = Choice.of([0, 1, 2, 4, 8])
RATE = Float(low=1e-4, high=1e-1, log=True)


def mixed_space() -> SearchSpace:
    """Return a space with every kind of gene, most of them conditional.

    It has an exclusive group, a layer gate, sizes that include 0, and real numbers.
    """
    return SearchSpace(
        backbone=SMALL,
        adapters={
            "lora": AdapterChoice(kind="lora", fields={"rank": RANKS, "alpha": Float(low=1.0, high=64.0, log=True)},
                                  vary={"rank": "layer"}),
            "beside": AdapterChoice(kind="bottleneck", fields={"size": Int(low=0, high=6), "dropout":
                                    Float(low=0.0, high=0.3), "form": Choice(choices=("serial", "parallel"))}),
            "prefix": AdapterChoice(kind="prefix", placement="stage", fields={"length": Int(low=1, high=9, log=True)}),
        },
        one_of=[OneOf(name="type", members=("lora", "beside"), optional=True)],
        layer_gate=True,
        stages=2,
        training={"learning_rate": RATE, "schedule": Choice(choices=("linear", "cosine"))},
    )  # fmt: skip
