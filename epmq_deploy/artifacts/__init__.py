"""What the stages write: output folders with typed manifests and model cards."""
