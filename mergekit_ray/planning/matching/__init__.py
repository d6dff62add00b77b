"""Which tensors of several models belong together, and what becomes of those that do not."""
