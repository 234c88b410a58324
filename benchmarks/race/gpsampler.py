"""Optuna's own Gaussian-process sampler, for comparison: an arm of the race, not a searcher of autopeft."""

from __future__ import annotations

import warnings

import optuna
from optuna.samplers import GPSampler

from autopeft.searchers.optuna_samplers import NsgaII, OptunaSearcher


class GpSampler(OptunaSearcher):
    """It models the genes that all trials share. As in NSGA-II, a trial passes on random values of its inactive genes:
    otherwise nothing but the unconditional ones would be left.
    """

    name = "gpsampler"
    summary = "Optuna's GPSampler: LogEHVI on independent Gaussian processes"
    visible_genes = NsgaII.visible_genes

    def sampler(self, seed):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return GPSampler(seed=seed, n_startup_trials=10, warn_independent_sampling=False)
