"""The study file: settings, their checks, and what they declare."""
