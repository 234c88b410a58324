"""Declarations: domains, adapters, sites, spaces and architectures."""
