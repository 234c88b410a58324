"""Descriptions of frozen transformers, and the introspection that makes them."""
