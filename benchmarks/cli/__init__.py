"""The commands of `python -m autopeft.benchmarks`."""
