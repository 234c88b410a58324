"""Searchers against each other: problems with a known answer, the runs, and the tables of docs/searchers.md."""
