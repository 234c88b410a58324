"""The study loop, tracking, recipes, exporters and the command line."""
