"""Bayesian optimisation: the searcher `bo` and its parts."""
