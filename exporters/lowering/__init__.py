"""Rewriting the MatMulNBits graph into what a format wants."""
