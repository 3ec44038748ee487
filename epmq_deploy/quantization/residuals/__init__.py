"""Per-task residuals: low-rank corrections that bring one shared model close to every expert."""
