"""Plain data that everything else is written in: errors, dtypes, expressions, plans, registries.

Nothing here imports torch or does I/O.
"""
