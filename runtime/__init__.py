"""Running exported graphs in onnxruntime: in applications (`load`), and to evaluate them."""

from epmq_deploy.runtime.deployed import load
from epmq_deploy.runtime.deployed_classifier import Prediction
from epmq_deploy.runtime.deployed_model import DeployedModel
from epmq_deploy.runtime.deployed_writer import Answer, DeployedWriter

__all__ = ["Answer", "DeployedModel", "DeployedWriter", "Prediction", "load"]
