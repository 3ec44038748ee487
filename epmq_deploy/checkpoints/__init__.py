"""Checkpoints as they are found: folders opened once, tensors read one at a time."""
