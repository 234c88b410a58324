"""Searchers, one file for each kind. CLI, schema and tables derive from the registry `SEARCHERS`."""

from __future__ import annotations

from autopeft.search_space.registry import Registry
from autopeft.searchers.base import Searcher, Suggestion
from autopeft.searchers.bo.bayesian import Bayesian
from autopeft.searchers.enumerated import Grid, Qmc
from autopeft.searchers.evolution import Evolution
from autopeft.searchers.linas import Linas
from autopeft.searchers.optuna_samplers import NsgaII, Random, Tpe
from autopeft.searchers.scored.from_scores import FromScores
from autopeft.searchers.scored.gated import Gated
from autopeft.searchers.scored.proxied import Proxied
from autopeft.searchers.scored.shrunk import Shrunk

SEARCHERS: Registry[type[Searcher]] = Registry(
    "autopeft.searchers",
    Searcher,
    "name",
    (Random, Qmc, Tpe, NsgaII, Evolution, Linas, Bayesian, Proxied, Gated, Shrunk, Grid),
)

__all__ = ["SEARCHERS", "FromScores", "Searcher", "Suggestion"]
