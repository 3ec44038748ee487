"""What text classifiers have in common."""

import torch
from torch import Tensor

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.models.encoders.classifier import ClassifierFamily, HeadLayout
from epmq_deploy.models.head import TaskHead
from epmq_deploy.models.text_inputs import TextInputs
from epmq_deploy.models.tokens import TokenWeights

# What saves experts that label words.
WORD_CLASSIFIER = "AutoModelForTokenClassification"


class TextClassifierFamily(TextInputs, ClassifierFamily):
    """Encoders of texts.

    Attributes:
        word_head: where experts that label words keep their head, one linear layer.
    """

    reads_tokens = True
    word_head = HeadLayout()

    def is_head(self, key: str) -> bool:
        """Whether it belongs to a head, of texts or of words."""
        return super().is_head(key) or key in self.word_head.tensors.values()

    def expert_word_head(self, expert: Checkpoint) -> TaskHead | None:
        """Read the expert's classifier of words.

        Raises:
            RecipeError: one of its tensors is missing.
        """
        return self.read_head(expert, self.word_head, WORD_CLASSIFIER)

    def tokens(self, *inputs: Tensor, stream: str = "") -> TokenWeights:
        """Return that padding is not real, and the first token is read where heads read one."""
        mask = inputs[self.input_names.index("attention_mask")]
        first = torch.zeros(len(mask), dtype=torch.int64) if self.reads_one_token else None
        return TokenWeights(mask.bool(), first)
