"""Encoders without a family of their own, taken apart by running them once."""
