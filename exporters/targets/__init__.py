"""Deployment targets: which formats suit a device, and what its kernels take."""
