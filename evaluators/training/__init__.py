"""Training of candidates, one after the other and packed."""
