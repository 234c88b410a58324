"""Every adapter type in a small and a large setting: quality, cost and place on the front (command `adapters`)."""
