"""One shard: read, computed and written within a budget of memory."""
