"""Reports of a study: tables, pictures and the interactive page."""
