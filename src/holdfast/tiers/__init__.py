"""The tiers: writing checkpoints to them, and choosing what to load."""
