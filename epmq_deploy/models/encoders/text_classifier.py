"""What text classifiers have in common."""

import torch
from torch import Tensor

from epmq_deploy.models.encoders.classifier import ClassifierFamily
from epmq_deploy.models.text_inputs import TextInputs
from epmq_deploy.models.tokens import TokenWeights


class TextClassifierFamily(TextInputs, ClassifierFamily):
    """Encoders of texts."""

    def tokens(self, *inputs: Tensor, stream: str = "") -> TokenWeights:
        """Return that padding is not real, and the first token is read where heads read one."""
        mask = inputs[self.input_names.index("attention_mask")]
        first = torch.zeros(len(mask), dtype=torch.int64) if self.reads_one_token else None
        return TokenWeights(mask.bool(), first)
