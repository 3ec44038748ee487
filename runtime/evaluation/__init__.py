"""Evaluating exported graphs: accuracy, latency, memory, and how sure differences are."""
