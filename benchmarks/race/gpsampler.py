"""Optuna's own Gaussian-process sampler, for comparison: an arm of the race, not a searcher of autopeft."""

from __future__ import annotations

import warnings

import optuna
from optuna.samplers import BaseSampler, GPSampler
from typing_extensions import override

from autopeft.searchers.optuna_samplers import NsgaII, OptunaSearcher


class GpSampler(OptunaSearcher):
    """Optuna's GPSampler, which models the genes that all trials share.

    As in `NsgaII`, a trial has random values of its inactive genes: otherwise only the unconditional genes would be
    modelled.
    """

    name = "gpsampler"
    summary = "Optuna's GPSampler: LogEHVI on independent Gaussian processes"
    visible_genes = NsgaII.visible_genes

    @override
    def sampler(self, seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return GPSampler(seed=seed, n_startup_trials=10, warn_independent_sampling=False)
