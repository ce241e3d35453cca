"""Copy the app state to host memory and write it to disk."""
