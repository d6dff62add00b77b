"""Weights that ``torch.save`` pickled, read as data: where each tensor lies in the file. Nothing of the file is run."""
