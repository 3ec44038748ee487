"""Layouts of model folders: one module each, found by its ``LAYOUT``."""
