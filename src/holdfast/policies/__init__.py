"""Rules of a run: which checkpoints stay, which saves are refused, when to warn."""
