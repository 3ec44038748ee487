"""Merge fine-tuned experts, quantize the result with E-PMQ and deploy it as ONNX.

The core library: recipe, models, tasks, merging, calibration and quantization. It knows neither
ONNX (``epmq_deploy.exporters``, ``epmq_deploy.runtime``) nor the terminal (``epmq_deploy.cli``).
"""

from importlib.metadata import version

__version__ = version("epmq-deploy")
