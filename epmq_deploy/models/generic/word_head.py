"""Finding out how classifiers of words of a model type get from hidden states to logits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from epmq_deploy.errors import RecipeError
from epmq_deploy.models.encoders.classifier import HeadLayout


def word_head_layout(
    config: Mapping[str, Any], layouts: Sequence[HeadLayout], where: object
) -> HeadLayout:
    """Return the layout of a model type's classifiers of words.

    Args:
        config: the base's ``config.json``.
        layouts: that they may have.
        where: what to call the expert in the message.

    Raises:
        RecipeError: they have another one, or ``transformers`` has no such classifiers.
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
    for layout in layouts:
        if outside == set(layout.tensors.values()):
            return layout
    raise RecipeError(
        f"{where}: the head of classifiers of words of type {kind.model_type} is not supported "
        f"(it has {', '.join(sorted(outside))})"
    )
