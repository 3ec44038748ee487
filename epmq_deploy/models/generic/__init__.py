"""Classifiers without a family of their own, encoders and decoders, taken apart by running them."""
