"""DistilBERT encoders (Sanh et al., arXiv 1910.01108) as ``transformers`` lays them out."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from epmq_deploy.models.blocks import Group
from epmq_deploy.models.encoders.classifier import HeadLayout
from epmq_deploy.models.encoders.text_classifier import TextClassifierFamily


class DistilBertFamily(TextClassifierFamily):
    """DistilBERT, for classifying texts.

    Heads are the experts': a linear layer with ReLU and a classifier, on ``[CLS]``.
    """

    name = "distilbert"
    model_types = ("distilbert",)
    architecture = (
        "dim",
        "hidden_dim",
        "n_layers",
        "n_heads",
        "activation",
        "max_position_embeddings",
        "sinusoidal_pos_embds",
        "vocab_size",
    )
    prefixes = ("distilbert.",)
    deployed = ("embeddings.", "transformer.")
    heads = ("pre_classifier.", "classifier.")
    head = HeadLayout(pooler="pre_classifier", activation="relu")
    model_options: Mapping[str, Any] = MappingProxyType({})
    block_list = "transformer.layer"
    # As BERT's, blocks normalise after each residual sum.
    groups = (
        Group(("attention.q_lin", "attention.k_lin", "attention.v_lin")),
        Group(("attention.out_lin",)),
        Group(("ffn.lin1",), norm="sa_layer_norm"),
        Group(("ffn.lin2",)),
    )
    block_norm = "output_layer_norm"


FAMILY = DistilBertFamily()
