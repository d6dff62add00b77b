"""What a person or a log sees of a merge, and what Ctrl-C does."""
