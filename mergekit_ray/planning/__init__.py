"""Recipes and headers become plans. Pure: no weight is read, torch is not imported."""
