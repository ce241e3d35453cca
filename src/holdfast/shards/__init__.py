"""Tensors to files and back, in the torch.distributed.checkpoint format."""
