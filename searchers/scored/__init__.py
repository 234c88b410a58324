"""Searchers that start from scores of thousands of candidates."""
