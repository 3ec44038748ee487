"""Families of models that generate text."""
