"""Heads of experts that embed texts, as sentence-transformers saved them."""

import logging
from pathlib import Path
from typing import cast, get_args

from safetensors.torch import load_file
from torch import Tensor

from epmq_deploy.checkpoints.files import SINGLE_FILE
from epmq_deploy.checkpoints.sentence_transformer import MODULES, DenseModule, SentenceTransformer
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.embedding_head import DenseLayer, EmbeddingHead
from epmq_deploy.models.head import ACTIVATIONS, Activation
from epmq_deploy.models.pooling import EmbeddingSettings, Pooling

log = logging.getLogger(__name__)


def embedding_settings(folder: Path) -> EmbeddingSettings | None:
    """Return how an expert embeds texts; None where it has no ``modules.json``.

    Raises:
        RecipeError: it does so in a way that is not supported.
    """
    expert = SentenceTransformer.open(folder)
    if expert is None:
        return None
    unknown = [name for name in expert.pooling if name not in get_args(Pooling)]
    if unknown or not expert.pooling:
        raise RecipeError(
            f"{folder}: pools tokens by {', '.join(unknown) or 'nothing'}; supported are "
            f"{', '.join(get_args(Pooling))}"
        )
    pooling = cast(tuple[Pooling, ...], expert.pooling)
    return EmbeddingSettings(pooling, expert.normalize, expert.longest)


def embedding_head(folder: Path) -> EmbeddingHead:
    """Read the head of an expert that embeds texts.

    Raises:
        RecipeError: as ``embedding_settings``, or a dense layer cannot be read.
    """
    expert, settings = SentenceTransformer.open(folder), embedding_settings(folder)
    assert expert is not None and settings is not None, f"{folder} has no {MODULES}"
    if expert.default_prompt:
        log.warning(
            "%s: texts are embedded without its default prompt %r; put it into the data where it "
            "belongs",
            folder,
            expert.default_prompt,
        )
    return EmbeddingHead(settings, [_dense_layer(module) for module in expert.dense])


def _dense_layer(module: DenseModule) -> DenseLayer:
    name = module.activation.lower()
    if name not in (*ACTIVATIONS, "identity"):
        raise RecipeError(f"{module.folder}: activation {module.activation} is not supported")
    tensors = _tensors(module.folder / SINGLE_FILE)
    activation = None if name == "identity" else cast(Activation, name)
    return DenseLayer(tensors["linear.weight"], tensors.get("linear.bias"), activation)


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except Exception as error:  # safetensors raises several types
        raise RecipeError(f"{file}: not readable as safetensors ({error})") from error
    if "linear.weight" not in tensors:
        raise RecipeError(f"{file}: holds no linear.weight")
    return tensors
