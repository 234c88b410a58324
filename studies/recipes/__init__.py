"""Recipes: one configuration as a file, and how to pick one from a study."""
