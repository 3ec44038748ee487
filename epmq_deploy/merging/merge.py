"""The merge stage: experts in, one Hugging Face folder out, tensor by tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.checkpoints import (
    Checkpoint,
    copy_settings,
    fetch_model,
    save_sharded,
    weight_files,
)
from epmq_deploy.errors import EpmqError, MismatchError, NumericsError
from epmq_deploy.merging.checkpoint_vectors import CheckpointTaskVectors
from epmq_deploy.merging.method import MergeMethod, MergeOptions
from epmq_deploy.merging.methods import MERGE_METHODS
from epmq_deploy.merging.preflight import check_experts
from epmq_deploy.models import family_of
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.recipe import Recipe
from epmq_deploy.stage import (
    Manifest,
    atomic_folder,
    files_sha256,
    fingerprint,
    refuse_existing,
    write_manifest,
)


@dataclass(frozen=True)
class Experts:
    """Base and experts, opened.

    Attributes:
        base: the base model.
        experts: task name to expert, canonical tensor names.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]


def open_experts(recipe: Recipe) -> Experts:
    """Open base and experts; nothing is read yet.

    Raises:
        MismatchError: names every folder that cannot be opened.
        RecipeError: the base's model type is not supported.
    """
    problems = []
    try:
        base_folder = fetch_model(recipe.base.path)
    except EpmqError as error:
        base_folder = None
        problems.append(f"base: {error}")
    folders = {}
    for name, task in recipe.tasks.items():
        try:
            folders[name] = fetch_model(task.expert)
        except EpmqError as error:
            problems.append(f"expert {name!r}: {error}")
    if problems or base_folder is None:
        raise MismatchError("models cannot be opened", problems)
    family = family_of(base_folder)
    opened = {}
    for label, folder in {"": base_folder, **folders}.items():
        try:
            opened[label] = Checkpoint.open(folder, family.canonical_key)
        except EpmqError as error:
            problems.append(str(error))
    if problems:
        raise MismatchError("models cannot be opened", problems)
    return Experts(opened.pop(""), opened)


def check_models(recipe: Recipe) -> tuple[Experts, tuple[str, ...]]:
    """Open base and experts and check that they fit; also the names of the tensors to merge.

    Raises:
        MismatchError: all problems at once.
        RecipeError: the base's model type is not supported.
    """
    opened = open_experts(recipe)
    mixed = recipe.merge.mixed_dtypes
    return opened, check_experts(opened.base, opened.experts, mixed_dtypes=mixed)


def merge_fingerprint(recipe: Recipe, experts: Experts) -> tuple[str, dict[str, str]]:
    """What decides the merge: fingerprint and input hashes by role."""
    inputs = {"base": files_sha256(weight_files(experts.base.folder))}
    for name, expert in experts.experts.items():
        inputs[f"expert:{name}"] = files_sha256(weight_files(expert.folder))
    return fingerprint("merge", recipe.merge.model_dump(mode="json"), inputs), inputs


def merge(
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Merge the recipe's experts into ``output``, a loadable Hugging Face folder.

    Tensors that no expert holds (a CLIP base's text tower) and integer tensors are copied from
    the base.

    Raises:
        MismatchError: the experts do not fit the base; all problems at once.
        RecipeError: the output exists, or a folder cannot be read.
    """
    progress = progress or NoProgress()
    refuse_existing(output, overwrite)
    opened, names = check_models(recipe)
    base, experts, options = opened.base, opened.experts, recipe.merge
    mark, inputs = merge_fingerprint(recipe, opened)
    method = MERGE_METHODS[options.method]
    vectors = CheckpointTaskVectors(
        base, tuple(experts.values()), names, device or torch.device("cpu")
    )
    dtypes = {name: _output_dtype(options, info.dtype) for name, info in base.tensors.items()}
    sizes = {
        name: dtypes[name].itemsize * torch.Size(info.shape).numel()
        for name, info in base.tensors.items()
    }
    with atomic_folder(output, overwrite=overwrite) as folder:
        copy_settings(base.folder, folder)
        merged = _merged_tensors(base, vectors, method, options)
        stored = ((name, _stored(name, value, dtypes[name])) for name, value in merged)
        save_sharded(folder, sizes, progress.track(stored, "merging", total=len(sizes)))
        details = {
            "method": method.name,
            "experts": len(experts),
            "merged_tensors": len(names),
            "copied_tensors": len(base.tensors) - len(names),
        }
        return write_manifest(folder, Manifest("merge", mark, recipe, inputs, details=details))


def _merged_tensors(
    base: Checkpoint,
    vectors: CheckpointTaskVectors,
    method: MergeMethod[Any],
    options: MergeOptions,
) -> Iterator[tuple[str, Tensor]]:
    statistics = method.statistics(vectors, options) if method.statistics else None
    merged = set(vectors.names)
    for name in base.tensors:
        if name in merged:
            start = vectors.loaded(base, name)
            yield name, method.merge(start, vectors.of_tensor(name), options, statistics).cpu()
        else:
            yield name, base.load(name)


def _stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.to(dtype)
    if dtype.is_floating_point and not bool(torch.isfinite(value).all()):
        raise NumericsError(
            f"merging {name} gave NaN or infinite values in {dtype}; lower merge.scaling or set "
            "merge.dtype: float32"
        )
    return value


def _output_dtype(options: MergeOptions, stored: torch.dtype) -> torch.dtype:
    if options.dtype == "base" or not stored.is_floating_point:
        return stored
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype
