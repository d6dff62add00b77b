"""Chat templates: the named ones, what models have, and a check that renders a conversation."""
