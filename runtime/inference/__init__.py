"""Exported models in applications."""
