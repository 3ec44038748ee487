"""Quantizing a merged model to integer codes."""
