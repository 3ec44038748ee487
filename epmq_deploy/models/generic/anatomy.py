"""How the classifiers of one model type are put together."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from epmq_deploy.checkpoints.tensors import Transposed
from epmq_deploy.compat import renamed, transposed_layers, weight_steps
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.encoders.classifier import HeadLayout
from epmq_deploy.models.generic.head import head_of
from epmq_deploy.models.generic.pooling import Pooling
from epmq_deploy.models.generic.probe import NotUnderstood, Probe, last_hidden, probe

_POOLER = "pooler"


@dataclass(frozen=True)
class Anatomy:
    """How the classifiers of one model type are put together.

    Attributes:
        modality: what they read.
        input_names: of the encoder.
        pooling: how hidden states become embeddings.
        head: what turns embeddings into logits.
        prefix: what stands before the encoder's tensor names in classifiers.
        without: modules of the encoder that belong to the head.
        encoder_class: what ``transformers`` calls the encoder.
        encoder: names of the encoder's parameters.
        vocabulary: rows of the table of tokens; 0 for images.
        positions: the longest text, in tokens; 0 for images.
        padding: id of the padding token where the config names one.
        steps: transformers' own, from the names files have to those the loaded model has.
        transposed: names of the encoder's parameters that files hold the transpose of.
    """

    modality: Literal["text", "image"]
    input_names: tuple[str, ...]
    pooling: Pooling
    head: HeadLayout
    prefix: str
    without: tuple[str, ...]
    encoder_class: str
    encoder: frozenset[str]
    vocabulary: int
    positions: int
    padding: int | None
    steps: tuple[Any, ...]
    transposed: frozenset[str]

    def rename(self, key: str) -> str | tuple[str, ...]:
        """Return the loaded encoder's name for a stored tensor, several for its parts."""
        names = renamed(key, self.steps)
        if not isinstance(names, str):
            return tuple(name.removeprefix(self.prefix) for name in names)
        name = names.removeprefix(self.prefix)
        return Transposed(name) if name in self.transposed else name


def anatomy_of(config: Mapping[str, Any], where: object) -> Anatomy:
    """Find out how classifiers with this ``config.json`` are put together.

    Args:
        config: the base's.
        where: what to call it in messages.

    Raises:
        RecipeError: they cannot be taken apart; says why.
    """
    try:
        return _anatomy(json.dumps(config, sort_keys=True))
    except NotUnderstood as error:
        raise refusal(where, config.get("model_type"), error) from error


def refusal(where: object, model_type: object, reason: object) -> RecipeError:
    """Return the error for a model that cannot be taken apart."""
    return RecipeError(
        f"{where}: model type {model_type!r} has no family of its own, and the generic one cannot "
        f"take it: {reason}"
    )


@lru_cache(maxsize=2)
def _anatomy(content: str) -> Anatomy:
    config = json.loads(content)
    seen = probe(config)
    head, pooling = head_of(seen)
    encoder, text = seen.encoder, seen.modality == "text"
    pooler = getattr(encoder, _POOLER, None)
    # One without weights only takes a mean.
    stays = isinstance(pooler, nn.Module) and not list(pooler.parameters())
    if isinstance(pooler, nn.Module) and not stays:
        setattr(encoder, _POOLER, None)
        _check_without_pooler(seen)
    return Anatomy(
        modality=seen.modality,
        input_names=seen.input_names,
        pooling=pooling,
        head=head,
        prefix=seen.prefix,
        without=() if stays else (_POOLER,),
        encoder_class=type(encoder).__name__,
        encoder=frozenset(name for name, _ in encoder.named_parameters()),
        vocabulary=int(seen.model.config.vocab_size) if text else 0,
        positions=_positions(encoder, seen.model.config) if text else 0,
        padding=seen.config_padding,
        steps=_steps(seen.model, encoder),
        transposed=frozenset(f"{name}.weight" for name in transposed_layers(encoder)),
    )


@torch.no_grad()
def _check_without_pooler(seen: Probe) -> None:
    inputs: Mapping[str, Tensor] = dict(zip(seen.input_names, seen.inputs, strict=True))
    try:
        again = last_hidden(seen.encoder(**inputs))
    except Exception as error:  # models raise anything
        raise NotUnderstood(f"its encoder does not run without pooler ({error})") from error
    if not torch.allclose(again, seen.hidden, atol=1e-5):
        raise NotUnderstood("its encoder gives something else without pooler")


def _positions(encoder: nn.Module, settings: Any) -> int:
    """Return the longest text; some models number positions after the padding token's id."""
    most = int(settings.max_position_embeddings)
    for name, module in encoder.named_modules():
        table = isinstance(module, nn.Embedding) and module.num_embeddings == most
        if table and "position" in name and module.padding_idx is not None:
            return most - int(module.padding_idx) - 1
    return most


def _steps(model: Any, encoder: nn.Module) -> tuple[Any, ...]:
    steps = weight_steps(model)
    if steps is None:
        raise NotUnderstood("its files put several of its tensors together in an unknown way")
    # What is stored under the loaded model's names, as merged models are, must stay as it is.
    if any(renamed(name, steps) != name for name, _ in encoder.named_parameters()):
        raise NotUnderstood("the names of its tensors in files and in the loaded model overlap")
    return steps
