"""Read the bytes of a checkpoint into tensors."""
