"""Tasks: their samples and their heads."""
