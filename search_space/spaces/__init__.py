"""Search spaces: declarations compiled into genes, presets, and the inverse map from a candidate to its genes."""
