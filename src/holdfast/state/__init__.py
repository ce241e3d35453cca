"""The live state of a run: what a save covers and how a load puts it back."""
