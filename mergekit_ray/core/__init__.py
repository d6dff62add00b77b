"""Plain data that everything else speaks in: errors, dtypes, tensors, expressions, plans, registries.

Nothing here imports torch or does I/O.
"""
