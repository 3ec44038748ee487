"""Building each task's head, a matrix that turns embeddings into logits."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.models import ModelFamily
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.recipe import Head, Task

HEADS_FILE = "heads.safetensors"


def build_heads(
    tasks: Mapping[str, Task],
    family: ModelFamily,
    folder: Path,
    features: int,
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Heads of all tasks that have one: float32 ``[C_t, features]``.

    Args:
        tasks: the recipe's tasks.
        family: the model's family, for zero-shot heads.
        folder: model folder with the text tower.
        features: width of the embedding.
        device: where to run the text tower.
        progress: shows one step per task.

    Raises:
        MismatchError: names every head that cannot be built or does not fit.
    """
    progress = progress or NoProgress()
    heads, problems = {}, []
    specified = [(name, task.head) for name, task in tasks.items() if task.head is not None]
    for name, head in progress.track(specified, "building heads"):
        try:
            matrix = _build(head, family, folder, device or torch.device("cpu"))
        except RecipeError as error:
            problems.append(f"task {name!r}: {error}")
            continue
        problems += [f"task {name!r}: {text}" for text in _problems(matrix, features)]
        heads[name] = matrix.to(torch.float32).contiguous()
    if problems:
        raise MismatchError("heads do not fit", problems)
    return heads


def _problems(matrix: Tensor, features: int) -> list[str]:
    if matrix.dim() != 2 or matrix.shape[1] != features:
        return [f"head of shape {list(matrix.shape)}, expected [classes, {features}]"]
    if not bool(torch.isfinite(matrix).all()):
        return ["the head holds NaN or infinite values"]
    if len(torch.unique(matrix, dim=0)) < len(matrix):
        return ["two classes have the same row in the head and cannot be told apart"]
    return []


def _build(head: Head, family: ModelFamily, folder: Path, device: torch.device) -> Tensor:
    if head.classes is not None:
        return family.zero_shot_head(folder, head.classes, head.templates, device)
    assert head.matrix is not None, "the recipe checks that one of the two is given"
    try:
        with safe_open(head.matrix, framework="pt") as handle:
            keys = list(handle.keys())
            if len(keys) != 1:
                raise RecipeError(f"{head.matrix}: expected one tensor, found {len(keys)}")
            matrix: Tensor = handle.get_tensor(keys[0])
            return matrix
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{head.matrix}: not readable as safetensors ({error})") from error


def save_heads(folder: Path, heads: Mapping[str, Tensor]) -> None:
    """Write heads into a stage's folder."""
    save_file(dict(heads), folder / HEADS_FILE)


def load_heads(folder: Path) -> dict[str, Tensor]:
    """Read the heads of a stage's folder, by task."""
    heads: dict[str, Tensor] = load_file(folder / HEADS_FILE)
    return heads
