"""Telling whether a decoder is meant to write texts or, under a classifier, to read them."""

from collections.abc import Iterable, Mapping
from typing import Any

from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.checkpoints.tensors import stored_tensors
from epmq_deploy.errors import EpmqError, RecipeError


def is_classifier(
    folder: ModelFolder, config: Mapping[str, Any], experts: Iterable[ModelFolder]
) -> bool:
    """Tell whether a decoder's experts are classifiers, or it has no output layer to write with.

    Args:
        folder: of the base, or of what was made from it.
        config: its ``config.json``.
        experts: their folders, where they are known.

    Raises:
        RecipeError: the experts write texts, and the base cannot.
    """
    if any(classifies(expert) for expert in experts):
        return True
    names = _tensor_names(folder)
    # Wrappers may have left prefixes before it.
    bare = bool(names) and not any(".model." in f".{name}" for name in names)
    if config.get("architectures"):
        bare = not _named(config, "ForCausalLM")
    if bare and any(_named(expert.config or {}, "ForCausalLM") for expert in experts):
        raise RecipeError(
            f"{folder.path}: a decoder without the output layer that its experts write with; give "
            "the base as it was before fine-tuning, with that layer"
        )
    return bare


def classifies(expert: ModelFolder) -> bool:
    """Tell whether an expert is a classifier, by its config or by the layer that gives logits."""
    if _named(expert.config or {}, "ForSequenceClassification"):
        return True
    return any(name.endswith("score.weight") for name in _tensor_names(expert))


def _named(config: Mapping[str, Any], kind: str) -> bool:
    return any(str(name).endswith(kind) for name in config.get("architectures") or ())


def _tensor_names(folder: ModelFolder) -> set[str]:
    try:
        return set(stored_tensors(folder.weight_files))
    except EpmqError:
        # What is wrong with the weights is said where they are opened.
        return set()
