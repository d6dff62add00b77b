"""One expression: from the bytes of its inputs to those of its result."""
