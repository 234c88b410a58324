"""Spaces: declarations compiled into genes, presets, and the way from a candidate back to its genes."""
