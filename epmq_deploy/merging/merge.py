"""The merge stage: experts in, one Hugging Face folder out, tensor by tensor."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.checkpoints import Checkpoint, copy_settings, save_sharded
from epmq_deploy.errors import NumericsError
from epmq_deploy.experts import open_sources
from epmq_deploy.merging.checkpoint_vectors import CheckpointTaskVectors
from epmq_deploy.merging.method import MergeMethod, MergeOptions
from epmq_deploy.merging.methods import MERGE_METHODS
from epmq_deploy.merging.preflight import check_experts
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.recipe import Recipe
from epmq_deploy.stage import (
    Manifest,
    atomic_folder,
    fingerprint,
    refuse_existing,
    write_manifest,
)


def merge_fingerprint(recipe: Recipe, inputs: Mapping[str, str]) -> str:
    """What decides the merge; ``inputs`` are the hashes of base and experts by role."""
    return fingerprint("merge", recipe.merge.model_dump(mode="json"), inputs)


def merge(
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Merge the recipe's experts into ``output``, a loadable Hugging Face folder.

    What is not deployed (a CLIP base's text tower), tensors no expert holds and integer tensors are
    copied from the base.

    Raises:
        MismatchError: the experts do not fit the base; all problems at once.
        RecipeError: the output exists, or a folder cannot be read.
    """
    progress = progress or NoProgress()
    refuse_existing(output, "merge", overwrite=overwrite)
    sources = open_sources(recipe)
    base, experts, options = sources.base, sources.experts, recipe.merge
    names = check_experts(sources, mixed_dtypes=options.mixed_dtypes)
    inputs = sources.sha256()
    mark = merge_fingerprint(recipe, inputs)
    method = MERGE_METHODS[options.method]
    vectors = CheckpointTaskVectors(
        base, tuple(experts.values()), names, device or torch.device("cpu")
    )
    dtypes = {name: _output_dtype(options, info.dtype) for name, info in base.tensors.items()}
    sizes = {
        name: dtypes[name].itemsize * torch.Size(info.shape).numel()
        for name, info in base.tensors.items()
    }
    with atomic_folder(output) as folder:
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
