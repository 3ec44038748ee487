"""What image classifiers have in common."""

import torch
from torch import Tensor

from epmq_deploy.models.encoders.classifier import ClassifierFamily
from epmq_deploy.models.image_inputs import ImageInputs
from epmq_deploy.models.tokens import TokenWeights


class ImageClassifierFamily(ImageInputs, ClassifierFamily):
    """Encoders of images, at the size the base's preprocessor settings give."""

    def tokens(self, *inputs: Tensor, stream: str = "") -> TokenWeights:
        """Return that all tokens are real, and the first is read where heads read one."""
        if not self.reads_one_token:
            return TokenWeights()
        return TokenWeights(pooled=torch.zeros(len(inputs[0]), dtype=torch.int64))
