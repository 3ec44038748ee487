"""Running exported graphs in onnxruntime: in applications (`load`), and to evaluate them."""

from epmq_deploy.runtime.inference.base import DeployedModel
from epmq_deploy.runtime.inference.classifier import Prediction
from epmq_deploy.runtime.inference.load import load
from epmq_deploy.runtime.inference.text_generation import Answer, DeployedTextGenerator

__all__ = ["Answer", "DeployedModel", "DeployedTextGenerator", "Prediction", "load"]
