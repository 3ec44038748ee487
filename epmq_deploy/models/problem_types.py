"""What logits mean: a class, any number of labels, a value, a class of each word, or an embedding.

Names and defaults are those of ``transformers`` (``PreTrainedConfig.problem_type``); heads that
label words or embed texts have none there, and are named here as on the Hugging Face hub.
"""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import ProblemType

SINGLE_LABEL: ProblemType = "single_label_classification"
MULTI_LABEL: ProblemType = "multi_label_classification"
REGRESSION: ProblemType = "regression"
TOKEN: ProblemType = "token_classification"
EMBEDDING: ProblemType = "feature_extraction"
# Of these, one class of several is predicted.
ONE_CLASS = (SINGLE_LABEL, TOKEN)
WITHOUT_CLASSES = (REGRESSION, EMBEDDING)
READING_TOKENS = (TOKEN, EMBEDDING)


def problem_type(given: ProblemType | None, config: Mapping[str, Any], outputs: int) -> ProblemType:
    """Return the problem type of a head.

    Args:
        given: by the recipe.
        config: of the checkpoint the head was trained in; empty for other heads.
        outputs: number of the head's logits.

    Raises:
        RecipeError: the config names an unknown type, or the head has the wrong number of logits.
    """
    kind = given or (TOKEN if labels_words(config) else config.get("problem_type"))
    kind = kind or (REGRESSION if outputs == 1 else SINGLE_LABEL)
    if kind not in get_args(ProblemType):
        raise RecipeError(
            f"problem_type {kind!r} in its config.json is none of "
            f"{', '.join(get_args(ProblemType))}; give head.problem_type"
        )
    if kind in ONE_CLASS and outputs == 1:
        raise RecipeError(
            "its head has a single logit, which cannot tell classes apart; give "
            f"head.problem_type: {REGRESSION} for a value, {MULTI_LABEL} for yes or no"
        )
    if kind == REGRESSION and outputs > 1:
        raise RecipeError(f"its head gives {outputs} values at once; only heads for one are known")
    return kind


def labels_words(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's settings say that its head labels each word.

    Args:
        config: ``config.json`` of a model, or the settings of an adapter.
    """
    return config.get("task_type") == "TOKEN_CLS" or any(
        name.endswith("ForTokenClassification") for name in architectures(config)
    )


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes that a checkpoint says it was saved from."""
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def divergence(logits: Tensor, expert_logits: Tensor, kind: ProblemType = SINGLE_LABEL) -> Tensor:
    """Return how far a model's predictions are from the expert's, ``[m]``.

    The KL divergence in nats; of independent labels, the sum of theirs; of values, half the squared
    error, which is the KL divergence of Gaussians of variance 1; of embeddings, 1 less the cosine
    of their angle.

    Args:
        logits: the model's, ``[m, C]``.
        expert_logits: the expert's, ``[m, C]``.
        kind: what they mean.
    """
    if kind == EMBEDDING:
        return 1 - F.cosine_similarity(logits, expert_logits, dim=1)
    if kind == REGRESSION:
        return 0.5 * (logits - expert_logits).square().sum(dim=1)
    ours, theirs = (log_chances(values, kind) for values in (logits, expert_logits))
    return (theirs.exp() * (theirs - ours)).flatten(1).sum(dim=1)


def entropy(logits: Tensor, kind: ProblemType = SINGLE_LABEL) -> Tensor:
    """Return the entropy of predictions ``[m]``, in nats, from logits ``[m, C]``.

    Of independent labels, the sum of theirs.

    Raises:
        RecipeError: values and embeddings have none.
    """
    if kind in WITHOUT_CLASSES:
        raise RecipeError(f"predictions of a head for {kind} have no entropy")
    scores = log_chances(logits, kind)
    return -(scores.exp() * scores).flatten(1).sum(dim=1)


def negative_log_likelihood(
    logits: Tensor, targets: Tensor, kind: ProblemType = SINGLE_LABEL
) -> Tensor:
    """Return the loss of true labels, ``[m]``, as ``transformers`` trains with, but summed.

    Args:
        logits: ``[m, C]``.
        targets: class numbers ``[m]``, labels ``[m, C]`` of 0 and 1, or values ``[m]``.
        kind: what they mean.
    """
    if kind == REGRESSION:
        return 0.5 * (logits[:, 0] - targets).square()
    if kind == MULTI_LABEL:
        return F.binary_cross_entropy_with_logits(
            logits, targets.to(logits.dtype), reduction="none"
        ).sum(dim=1)
    return F.cross_entropy(logits, targets, reduction="none")


def log_chances(logits: Tensor, kind: ProblemType) -> Tensor:
    """Return log-probabilities: ``[m, C]``, or ``[m, C, 2]`` of each label and its absence."""
    if kind == MULTI_LABEL:
        return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=2)
    return logits.log_softmax(dim=1)
