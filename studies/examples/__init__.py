"""Example studies, to run and to copy."""
