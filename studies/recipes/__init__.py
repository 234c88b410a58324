"""Recipes: single configurations as files, and their selection from a study."""
