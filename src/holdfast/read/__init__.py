"""Bytes of a checkpoint on their way into tensors."""
