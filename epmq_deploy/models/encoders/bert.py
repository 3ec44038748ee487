"""BERT encoders (Devlin et al., arXiv 1810.04805) as ``transformers`` lays them out."""

from pathlib import Path
from typing import Any

from epmq_deploy.errors import RecipeError
from epmq_deploy.models.blocks import Group
from epmq_deploy.models.encoders.classifier import HeadLayout
from epmq_deploy.models.encoders.text_classifier import TextClassifierFamily
from epmq_deploy.models.loading import TRANSFORMER_KEYS


class BertFamily(TextClassifierFamily):
    """BERT and what shares its layout (MiniLM), for classifying texts.

    Embeddings and encoder are merged and deployed. Pooler and classifier are the task's head: each
    expert (``AutoModelForSequenceClassification``) keeps its own.
    """

    name = "bert"
    model_types: tuple[str, ...] = ("bert",)
    input_names: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids")
    architecture = (
        *TRANSFORMER_KEYS,
        "max_position_embeddings",
        "type_vocab_size",
        "vocab_size",
    )
    prefixes: tuple[str, ...] = ("bert.",)
    # Checkpoints converted from the original release name the parts of LayerNorms so.
    renames = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
    deployed = ("embeddings.", "encoder.")
    heads: tuple[str, ...] = ("pooler.", "classifier.")
    head = HeadLayout(pooler="pooler.dense")
    block_list = "encoder.layer"
    # Blocks normalise after each residual sum: what feeds query, key and value is the last norm of
    # the block before, or the embeddings'.
    groups = (
        Group(("attention.self.query", "attention.self.key", "attention.self.value")),
        Group(("attention.output.dense",)),
        Group(("intermediate.dense",), norm="attention.output.LayerNorm"),
        Group(("output.dense",)),
    )
    block_norm = "output.LayerNorm"

    def check_config(self, folder: Path, config: dict[str, Any]) -> None:
        """Refuse relative positions and decoders."""
        positions = config.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise RecipeError(
                f"{folder}: position_embedding_type {positions!r} is not supported, only 'absolute'"
            )
        if config.get("is_decoder") or config.get("add_cross_attention"):
            raise RecipeError(
                f"{folder}: {self.name} as a decoder is not supported, only as an encoder"
            )


FAMILY = BertFamily()
