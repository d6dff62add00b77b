"""Routers of a Mixture of Experts, made from prompts by the base model's hidden states."""
