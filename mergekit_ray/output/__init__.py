"""The place a model is written to: what is there, who may write, how the result is published."""
