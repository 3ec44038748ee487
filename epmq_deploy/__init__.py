"""Merge fine-tuned experts, quantize the result with E-PMQ and deploy it as ONNX.

The core library: recipe, models, tasks, merging, calibration and quantization. It knows neither
ONNX (``epmq_deploy.exporters``, ``epmq_deploy.runtime``) nor the terminal (``epmq_deploy.cli``).
"""

from epmq_deploy.version import __version__

__all__ = ["__version__"]
