"""Searchers: random, QMC, TPE, NSGA-II, Bayesian, grid. CLI, schema and tables derive from the registry `SEARCHERS`."""

from __future__ import annotations

from autopeft.searchers.base import Searcher, Suggestion
from autopeft.searchers.bayesian import Bayesian
from autopeft.searchers.enumerated import Grid, Qmc
from autopeft.searchers.optuna_samplers import NsgaII, Random, Tpe

SEARCHERS: dict[str, type[Searcher]] = {
    searcher.name: searcher for searcher in (Random, Qmc, Tpe, NsgaII, Bayesian, Grid)
}

__all__ = ["SEARCHERS", "Searcher", "Suggestion"]
