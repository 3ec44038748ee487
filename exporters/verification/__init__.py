"""Checks before, during and after an export: inputs, codes, kernels, parity with torch."""
