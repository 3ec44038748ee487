"""Functions over tensors that merge methods share."""
