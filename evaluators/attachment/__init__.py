"""Attaches the adapters of several slots to one model, and takes them off again."""
