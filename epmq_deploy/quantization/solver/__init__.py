"""Functions over tensors that choose grids and codes."""
