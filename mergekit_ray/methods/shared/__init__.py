"""What merge methods share: their protocol, and sums, masks, selections and factorisations."""
