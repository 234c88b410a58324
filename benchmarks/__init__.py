"""Measurements of the project itself. No study needs them."""
