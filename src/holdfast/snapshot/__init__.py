"""The app state on its way to disk."""
