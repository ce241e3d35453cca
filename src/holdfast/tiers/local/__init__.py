"""The local tier: fast, frequent checkpoints on each node's own RAM or disk."""
