"""Running a model's blocks on calibration data, and statistics of what its layers receive."""
