"""Recipes and headers -> plans: pure, without torch."""
