"""Grids, the solver and the artifact they fill."""
