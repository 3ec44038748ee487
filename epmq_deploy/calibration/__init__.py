"""Calibration data, statistics and the targets a layer is quantized towards."""
