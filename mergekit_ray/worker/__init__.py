"""One shard: its inputs are read, its tensors computed and written, within a budget of memory."""
