"""What is in a shard file and in `.metadata`."""
