"""Weights that ``torch.save`` pickled, read as data: where in the file each tensor is. Nothing of the file is run."""
