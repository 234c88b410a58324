"""Adapters at run time: the only part of a search space that imports torch."""
