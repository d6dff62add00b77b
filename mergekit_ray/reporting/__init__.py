"""What a person or a log sees of a merge, and what the process does about signals."""
