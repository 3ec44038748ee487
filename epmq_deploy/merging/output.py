"""Writing a merged model: the base's settings and all tensors, in the chosen dtypes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.files import read_json
from epmq_deploy.checkpoints.weight_scan import all_finite
from epmq_deploy.checkpoints.writing import save_sharded
from epmq_deploy.errors import NumericsError
from epmq_deploy.models.experts import Sources
from epmq_deploy.options.merging import MergeOptions
from epmq_deploy.progress import Progress

_DTYPE_KEYS = ("dtype", "torch_dtype")


def write_merged(
    folder: Path,
    sources: Sources,
    tensors: Iterator[tuple[str, Tensor, bool]],
    options: MergeOptions,
    progress: Progress,
) -> None:
    """Write a merged model as a Hugging Face folder.

    Args:
        folder: existing folder.
        sources: the base's settings are copied, and it has all tensors.
        tensors: name, value and whether it was merged, in the base's order.
        options: set the dtype.
        progress: shows one step per tensor.

    Raises:
        NumericsError: values are not finite, or not in the chosen dtype.
    """
    base = sources.base
    base.source.copy_settings(folder)
    _adapt_config(folder / "config.json", sources)
    if options.dtype != "base":
        _set_dtype(folder / "config.json", options.dtype)
    layout = _layout(base, options)
    converted = (
        (name, base.tensors[name].to_store(_converted(name, value, layout[name][0], merged=merged)))
        for name, value, merged in tensors
    )
    save_sharded(folder, layout, progress.track(converted, "merging", total=len(layout)))


def merged_size(base: Checkpoint, options: MergeOptions) -> int:
    """Return how many bytes the weights of a merged model take."""
    return sum(
        dtype.itemsize * torch.Size(shape).numel()
        for dtype, shape in _layout(base, options).values()
    )


def _layout(
    base: Checkpoint, options: MergeOptions
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of what is written, by name."""
    return {
        name: (_output_dtype(options, info.dtype), info.stored_shape)
        for name, info in base.tensors.items()
    }


def _adapt_config(file: Path, sources: Sources) -> None:
    """Have the config describe what was merged, where that is not what the base's describes."""
    config = sources.base.source.config or {}
    adapted = sources.family.merged_config(config)
    if adapted != config:
        file.write_text(json.dumps(adapted, indent=2) + "\n", encoding="utf-8")


def _set_dtype(file: Path, dtype: str) -> None:
    """Set the dtype that models are loaded in wherever the config or a sub-config declares one."""
    if not file.is_file():
        return
    config = read_json(file)
    if _replace_dtypes(config, dtype):
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _replace_dtypes(config: dict[str, Any], dtype: str) -> bool:
    """Replace the dtypes that a config declares; tell whether that changed any."""
    changed = False
    for key, value in config.items():
        if isinstance(value, dict):
            changed |= _replace_dtypes(value, dtype)
        elif key in _DTYPE_KEYS and isinstance(value, str) and value != dtype:
            config[key], changed = dtype, True
    return changed


def _converted(name: str, value: Tensor, dtype: torch.dtype, *, merged: bool) -> Tensor:
    value = value.to(dtype)
    if not dtype.is_floating_point or all_finite(value):
        return value
    if merged:
        raise NumericsError(
            f"merging {name} gave NaN or infinite values in {dtype}; lower merge.scaling or set "
            "merge.dtype: float32"
        )
    raise NumericsError(
        f"{name}, which is copied from the base, has values that {dtype} cannot hold; set "
        "merge.dtype: base or float32"
    )


def _output_dtype(options: MergeOptions, stored: torch.dtype) -> torch.dtype:
    if options.dtype == "base" or not stored.is_floating_point:
        return stored
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype
