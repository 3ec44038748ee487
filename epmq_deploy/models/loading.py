"""Reading configs and loading weights into modules; comparing configs."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import nn

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.checkpoints.tensors import Rename
from epmq_deploy.compat import model_type_of_class
from epmq_deploy.errors import MismatchError, RecipeError

# What config.json calls the sizes and functions that most transformers have.
TRANSFORMER_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
)

M = TypeVar("M", bound=nn.Module)


def fill(
    model: M,
    folder: Path,
    rename: Rename = lambda key: key,
    tied: Mapping[str, str] = MappingProxyType({}),
) -> M:
    """Load the checkpoint's tensors into parameters of the same names, float32, in eval mode.

    Tensors that are not parameters of the module are ignored: a folder may hold more, such as
    another tower.

    Args:
        model: its parameters may have any value.
        folder: a Hugging Face model folder.
        rename: as for ``Checkpoint.open``, to parameter names.
        tied: as for ``Checkpoint.open``.

    Raises:
        MismatchError: names every parameter the checkpoint lacks or holds in another shape.
    """
    parameters = dict(model.named_parameters())
    checkpoint = Checkpoint.open(ModelFolder.at(folder), rename, tied, parameters.__contains__)
    problems = []
    for name, parameter in parameters.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            problems.append(f"{name} is missing")
        elif info.shape != tuple(parameter.shape):
            problems.append(
                f"{name} has shape {list(info.shape)}, config.json makes it {list(parameter.shape)}"
            )
        else:
            parameter.data = checkpoint.load(name).to(torch.float32)
    if problems:
        raise MismatchError(f"{folder} does not hold the model its config.json describes", problems)
    return model.eval().requires_grad_(False)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model folder's ``config.json``.

    Raises:
        RecipeError: there is none, or it is not a JSON object.
    """
    config = ModelFolder.at(folder).config
    if config is None:
        raise RecipeError(f"{folder}: no config.json; expected a Hugging Face model folder")
    return config


def model_type_of(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the model type that a folder's ``config.json`` names.

    Raises:
        RecipeError: it names none.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type:
        return model_type
    advice = "add the one its architecture has"
    for name in config.get("architectures") or ():
        if (known := model_type_of_class(str(name))) is not None:
            advice = f'{name} has "model_type": "{known}"; add that'
    raise RecipeError(
        f"{folder}: config.json names no model_type, so nothing can load it; {advice}"
    )


def config_differences(
    keys: Iterable[str], base: Mapping[str, Any], expert: Mapping[str, Any]
) -> list[str]:
    """Return one sentence for each of ``keys`` that both configs hold with different values."""
    return [
        f"{key} is {expert[key]!r} in its config.json, the base has {base[key]!r}"
        for key in keys
        if key in base and key in expert and base[key] != expert[key]
    ]
