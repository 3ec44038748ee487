"""Evaluating exported graphs: accuracy, latency, memory, and the significance of differences."""
