"""Passes that rewrite the MatMulNBits graph into a format."""
