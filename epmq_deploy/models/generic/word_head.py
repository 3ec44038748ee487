"""Making sure that a model type's classifiers of words are what heads can be."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from epmq_deploy.errors import RecipeError


def check_word_head(config: Mapping[str, Any], tensors: Collection[str], where: object) -> None:
    """Make sure that classifiers of words are a linear layer on the encoder's hidden states.

    Args:
        config: the base's ``config.json``.
        tensors: names of that layer's tensors.
        where: what to call the expert in the message.

    Raises:
        RecipeError: they have more layers, or ``transformers`` has no such classifiers.
    """
    from transformers import AutoConfig, AutoModelForTokenClassification

    settings = dict(config)
    kind = AutoConfig.for_model(settings.pop("model_type"), **settings)
    try:
        with torch.device("meta"):
            model = AutoModelForTokenClassification.from_config(kind, trust_remote_code=False)
    except ValueError as error:
        raise RecipeError(
            f"{where}: transformers has no classifiers of words for models of type "
            f"{kind.model_type}"
        ) from error
    inside = f"{model.base_model_prefix}."
    outside = {name for name, _ in model.named_parameters() if not name.startswith(inside)}
    if others := sorted(outside - set(tensors)):
        raise RecipeError(
            f"{where}: classifiers of words of type {kind.model_type} have layers between encoder "
            f"and classifier ({', '.join(others)}), which are not supported"
        )
