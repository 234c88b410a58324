"""Routers of mixtures: their names, and what they have in common. Torch-free; `mixing.py` has their arithmetic."""

from __future__ import annotations

ROUTERS = ("token", "sigmoid", "sequence", "task", "poly", "soft", "arrow", "xlora", "uniform", "follow")
#: Routers that read a whole text before they decide about its first token.
LOOKING_AHEAD = ("sequence", "soft")
#: Routers that choose for a whole text.
DECIDING_BY_TEXT = ("sequence", "task")
#: Routers that go by the domain of a text.
BY_TASK = frozenset({"task", "poly"})
#: Routers that choose some of the experts.
CHOOSING = ("token", "sigmoid", "sequence", "task", "arrow", "follow")
#: Routers with a part for every expert, of which none is left out and none is always on.
MIXING = ("poly", "soft")
#: Routers between LoRAs that are given.
BETWEEN_GIVEN = ("arrow", "xlora")
#: Those that are asked to send as much to one expert as to another. What a task is sent to is its own affair.
BALANCED = ("token", "sigmoid", "sequence")
