"""Tokenizers as data: read, compared, united, written, and their chat templates."""
