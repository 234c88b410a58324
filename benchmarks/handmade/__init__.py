"""Whole studies against adapters that people make by hand, in equal time, on three data sets."""
