"""The merges of a recipe: each is built, and what a stage makes is a model of later ones."""
