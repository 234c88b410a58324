"""Analysis of trials: the front, statistics, the recommendation. It makes numbers, not files or pictures."""
