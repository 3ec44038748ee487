"""RoBERTa encoders (Liu et al., arXiv 1907.11692) as ``transformers`` lays them out."""

from typing import Any

from epmq_deploy.models.encoders.bert import BertFamily
from epmq_deploy.models.encoders.classifier import HeadLayout


class RobertaFamily(BertFamily):
    """RoBERTa and what shares its layout (XLM-RoBERTa), for classifying texts.

    BERT's encoder without segments. Heads are the experts': a linear layer with tanh and a
    classifier, on the first token ``<s>``.
    """

    name = "roberta"
    model_types = ("roberta", "xlm-roberta")
    input_names = ("input_ids", "attention_mask")
    prefixes = ("roberta.",)
    heads = ("pooler.", "classifier.", "lm_head.")
    head = HeadLayout("classifier.out_proj", "classifier.dense")
    tokenizer_files = ("vocab.json", "merges.txt")

    def positions(self, config: dict[str, Any]) -> int:
        """Positions are numbered after the padding token's id."""
        return super().positions(config) - int(config.get("pad_token_id", 1)) - 1


FAMILY = RobertaFamily()
