"""Running exported graphs in onnxruntime: in applications (`load`), and to evaluate them."""

from epmq_deploy.runtime.deployed import DeployedModel, Prediction, load

__all__ = ["DeployedModel", "Prediction", "load"]
