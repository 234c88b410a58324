"""Costs of candidates: measurement, prediction, and the size of packs."""
