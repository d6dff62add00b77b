"""Recipes: mergekit's YAML, and ours, as checked data.

`load` reads a file, a text or a mapping; `normal` brings a dense recipe into the one form that planning sees;
`settings` gives a method's parameters at each output tensor.
"""
