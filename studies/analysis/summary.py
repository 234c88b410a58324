"""A candidate in a line of text: its adapters with their sizes and places, and its learning rate."""

from __future__ import annotations

from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.problem import Trial


def summary(trial: Trial, backbone: Backbone) -> str:
    """Describe architecture and learning rate in a line: adapter types with their sizes, roles and layers."""
    groups: dict[str, dict[str, set[int]]] = {}
    for name, spec in trial.candidate.architecture:
        site = backbone.site(name)
        layers = groups.setdefault(spec.label, {}).setdefault(site.role, set())
        if site.layer is not None:
            layers.add(site.layer)
    parts = []
    for word, roles in groups.items():
        by_layers: dict[str, list[str]] = {}
        for role, layers in roles.items():
            by_layers.setdefault(_ranges(layers, backbone.num_layers), []).append(role)
        places = "; ".join(" ".join(names) + where for where, names in by_layers.items())
        parts.append(f"{word} at {places}")
    rate = trial.candidate.training.get("learning_rate")
    return " + ".join(parts or ["no adapter"]) + (f", lr {rate:.2g}" if rate else "")


def _ranges(layers: set[int], num_layers: int) -> str:
    if len(layers) in (0, num_layers):
        return ""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return " in layers " + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
