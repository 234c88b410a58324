"""Studies to run and to copy from."""
