"""Bare weights of ``open_clip`` with the name of their architecture: ``open_clip:NAME=PATH``.

Known are the architectures of Radford et al. (arXiv 2103.00020) and ViT-H/14.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from epmq_deploy.checkpoints.open_clip import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_FILES,
    clip_config,
    open_clip_tensors,
)
from epmq_deploy.checkpoints.pickle_conversion import refuse_pickled, refuse_pickled_file
from epmq_deploy.checkpoints.tensors import TensorInfo
from epmq_deploy.errors import MismatchError, RecipeError

PREFIX = "open_clip:"
_TOWERS = ("vision_model.", "text_model.")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
# Temporary folders by architecture and weights file; they exist until the process ends.
_folders: dict[tuple[str, Path], TemporaryDirectory[str]] = {}


def _architecture(
    embed: int, vision: Mapping[str, Any], text_width: int, text_layers: int = 12
) -> dict[str, Any]:
    """Return a ``model_cfg`` as open_clip's own configurations have it; the rest are defaults."""
    text = {"context_length": 77, "vocab_size": 49408, "width": text_width}
    text |= {"heads": text_width // 64, "layers": text_layers}
    return {"embed_dim": embed, "vision_cfg": {"image_size": 224, **vision}, "text_cfg": text}


_LARGE = {"layers": 24, "width": 1024, "patch_size": 14}
_HUGE = {"layers": 32, "width": 1280, "head_width": 80, "patch_size": 14}
_GELU = {
    "ViT-B-32": _architecture(512, {"layers": 12, "width": 768, "patch_size": 32}, 512),
    "ViT-B-16": _architecture(512, {"layers": 12, "width": 768, "patch_size": 16}, 512),
    "ViT-L-14": _architecture(768, _LARGE, 768),
    "ViT-L-14-336": _architecture(768, _LARGE | {"image_size": 336}, 768),
    "ViT-H-14": _architecture(1024, _HUGE, 1024, 24),
}
# ``model_cfg`` by name. OpenAI published the weights of the quickgelu variants.
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = _GELU | {
    f"{name}-quickgelu": model | {"quick_gelu": True} for name, model in _GELU.items()
}


def split_named(text: str) -> tuple[str, str] | None:
    """Split ``open_clip:NAME=PATH`` into name and path; None without that prefix.

    Raises:
        RecipeError: name or path is missing.
    """
    if not text.startswith(PREFIX):
        return None
    name, _, path = text.removeprefix(PREFIX).partition("=")
    if not (name and path):
        raise RecipeError(f"{text}: expected {PREFIX}NAME=PATH, PATH a safetensors file or folder")
    return name, path


def named_folder(name: str, path: Path) -> Path:
    """Make a temporary folder in the layout of ``open_clip`` for bare weights.

    It exists until the process ends. Images are preprocessed as for OpenAI's CLIP; the tokenizer is
    taken from the weights' folder.

    Args:
        name: of the architecture in ``open_clip``.
        path: a safetensors file, or a folder with one.

    Raises:
        RecipeError: the name is unknown, or there are no weights of such a model.
    """
    if name not in ARCHITECTURES:
        raise RecipeError(
            f"{PREFIX}{name}: unknown architecture; choose from "
            f"{', '.join(ARCHITECTURES)}, or give a folder with "
            f"{OPEN_CLIP_CONFIG}"
        )
    file = _weights(path).absolute()
    if (name, file) not in _folders:
        _check(name, file)
        directory = TemporaryDirectory(prefix="epmq-open-clip-")
        folder = Path(directory.name)
        content = {"model_cfg": ARCHITECTURES[name]}
        (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(content))
        (folder / OPEN_CLIP_FILES[0]).symlink_to(file)
        for tokenizer_file in (file.with_name(other) for other in _TOKENIZER):
            if tokenizer_file.is_file():
                (folder / tokenizer_file.name).symlink_to(tokenizer_file)
        _folders[name, file] = directory
    return Path(_folders[name, file].name)


def given_folder(folder: Path) -> Path:
    """Return the folder to name in messages: for bare weights, the one that holds their file."""
    files = (file for (_, file), directory in _folders.items() if Path(directory.name) == folder)
    return next((file.parent for file in files), folder)


def _weights(path: Path) -> Path:
    """Return the only safetensors file that ``path`` is or holds."""
    if path.is_file():
        refuse_pickled_file(path, f"{PREFIX}NAME=FILE with what this writes")
        if path.suffix != ".safetensors":
            raise RecipeError(f"{path}: not a safetensors file")
        return path
    if not path.is_dir():
        raise RecipeError(f"{path}: no such file or folder")
    if (path / OPEN_CLIP_CONFIG).is_file():
        raise RecipeError(
            f"{path}: has an {OPEN_CLIP_CONFIG}; give the folder without {PREFIX}NAME="
        )
    files = sorted(path.glob("*.safetensors"))
    if not files:
        refuse_pickled(path)
    if len(files) != 1:
        count = f"several ({', '.join(file.name for file in files)})" if files else "none"
        raise RecipeError(f"{path}: expected one safetensors file, found {count}")
    return files[0]


def _check(name: str, file: Path) -> None:
    """Make sure that a file holds towers of the architecture."""
    try:
        tensors = open_clip_tensors(file, lambda key: key)
    except MismatchError as error:
        raise RecipeError(
            f"{file}: not a CLIP in the layout of open_clip: it has {error.problems[0]}"
            f"{_more(error.problems)}"
        ) from error
    problems = _differences(ARCHITECTURES[name], file, tensors)
    if not problems:
        return
    others = [
        other for other, model in ARCHITECTURES.items() if not _differences(model, file, tensors)
    ]
    hint = (
        f"its tensors are those of {' or '.join(others)}"
        if others
        else "no known architecture has such tensors"
    )
    raise RecipeError(f"{file}: not the weights of {name}: {problems[0]}{_more(problems)}; {hint}")


def _more(problems: Sequence[str]) -> str:
    return f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""


def _differences(
    model: Mapping[str, Any], file: Path, tensors: Mapping[str, TensorInfo]
) -> list[str]:
    """List how a file's tensors differ from an architecture's; one tower may be absent."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        whole = CLIPModel(CLIPConfig.from_dict(clip_config({"model_cfg": model}, file)))
    shapes = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
    problems = [
        f"{name} has shape {list(info.shape)}, expected {list(shapes[name])}"
        for name, info in tensors.items()
        if name in shapes and info.shape != shapes[name]
    ]
    problems += [f"{name} is not part of it" for name in tensors if name not in shapes]
    held = tuple(tower for tower in _TOWERS if any(name.startswith(tower) for name in tensors))
    if not held:
        problems.append("it has neither tower")
    missing = [name for name in shapes if name.startswith(held) and name not in tensors]
    return problems + [f"{name} is missing" for name in missing]
