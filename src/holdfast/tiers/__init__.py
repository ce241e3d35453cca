"""Where checkpoints live and for how long: writing to a tier, and choosing what to load."""
