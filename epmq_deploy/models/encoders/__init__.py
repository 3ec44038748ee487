"""Families of encoders: images or texts in, an embedding for the tasks' heads out."""
