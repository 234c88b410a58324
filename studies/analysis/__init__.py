"""What trials mean: the front, statistics, the recommendation. Numbers only; no files, no pictures."""
