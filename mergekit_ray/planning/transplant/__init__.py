"""A model gets another one's tokens: which rows are carried over, and which are approximated."""
