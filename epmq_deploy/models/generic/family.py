"""Encoders of ``transformers`` that have no family of their own, taken apart by running them."""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from epmq_deploy.models.blocks import Block
from epmq_deploy.models.encoders.classifier import ClassifierFamily, load_encoder
from epmq_deploy.models.encoders.image_classifier import ImageClassifierFamily
from epmq_deploy.models.encoders.text_classifier import TextClassifierFamily
from epmq_deploy.models.generic.head import POOLINGS, anatomy_of
from epmq_deploy.models.generic.tracing import find_blocks
from epmq_deploy.models.loading import read_config

log = logging.getLogger(__name__)


class GenericFamily(ClassifierFamily):
    """One model type that no other family recognises; experts are its classifiers.

    The encoder is merged and deployed; one or two linear layers on the first token or the mean of
    all tokens are the experts' heads. What is found in the model is said in a warning.

    Args:
        folder: of the base, or of what was made from it.

    Raises:
        RecipeError: the model cannot be taken apart; says why.
    """

    architecture = (
        "hidden_size",
        "embedding_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
        "max_position_embeddings",
        "position_embedding_type",
        "type_vocab_size",
        "vocab_size",
        "image_size",
        "patch_size",
        "num_channels",
    )

    def __init__(self, folder: Path) -> None:
        config = read_config(folder)
        self.name = str(config.get("model_type"))
        self.model_types = (self.name,)
        self._folder = folder
        self._anatomy = anatomy_of(config, folder)
        self._warned = False
        self.head = self._anatomy.head
        self.heads = tuple(
            f"{name}." for name in (self.head.classifier, self.head.pooler) if name is not None
        )
        self.input_names = self._anatomy.input_names
        self.reads_one_token = self._anatomy.pooling == "first"

    def is_deployed(self, key: str) -> bool:
        """Whether it is a parameter of the encoder."""
        return key in self._anatomy.encoder and not self.is_head(key)

    def canonical_key(self, key: str) -> str | tuple[str, ...]:
        """Rename as ``transformers`` itself does."""
        return self._anatomy.rename(key)

    def load(self, folder: Path) -> nn.Module:
        """Load the encoder without pooler."""
        return load_encoder(folder, self.canonical_key, without=("pooler",))

    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """Find the blocks by running the model on example inputs.

        Raises:
            RecipeError: see ``find_blocks``.
        """
        device = next(model.parameters()).device
        inputs = [value.to(device) for value in self.example_inputs(self._folder, 2)]
        blocks = find_blocks(
            model, lambda: self.embed(model, *inputs), first_token=self.reads_one_token
        )
        if not self._warned:
            groups = [group for block in blocks for group in block.groups]
            log.warning(
                "model type %r has no family of its own: found %d blocks with %d groups of linear "
                "layers, %d of them after a norm; compare the result with the experts",
                self.name,
                len(blocks),
                len(groups),
                sum(group.norm is not None for group in groups),
            )
            self._warned = True
        return blocks

    def embed(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Pool hidden states as the model type's classifiers do."""
        named = dict(zip(self.input_names, inputs, strict=True))
        hidden: Tensor = model(**named).last_hidden_state
        mask = named.get("attention_mask")
        weights = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden.dtype)
        return POOLINGS[self._anatomy.pooling](hidden, weights)


class GenericTextFamily(GenericFamily, TextClassifierFamily):
    """A model type that reads texts, with a tokenizer in ``tokenizer.json``."""

    modality = "text"
    tokenizer_files = ("tokenizer.json",)

    def positions(self, config: dict[str, Any]) -> int:
        """Return the size of the table of positions."""
        return self._anatomy.positions


class GenericImageFamily(GenericFamily, ImageClassifierFamily):
    """A model type that reads images."""

    modality = "image"


def generic_family(folder: Path) -> GenericFamily:
    """Return the family of a folder whose model type no other family recognises.

    Raises:
        RecipeError: the model cannot be taken apart; says why.
    """
    anatomy = anatomy_of(read_config(folder), folder)
    kinds: dict[str, type[GenericFamily]] = {"text": GenericTextFamily, "image": GenericImageFamily}
    return kinds[anatomy.modality](folder)
