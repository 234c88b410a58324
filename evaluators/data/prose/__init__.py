"""The embedded retained rows: paragraphs of prose about science and language, from the documentation of packages."""
