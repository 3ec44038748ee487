"""Writing safetensors files with one tensor in memory at a time, which ``safetensors`` cannot."""

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.checkpoints.files import INDEX_FILE, SINGLE_FILE
from epmq_deploy.checkpoints.tensors import DTYPES


def write_tensors(
    file: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write a safetensors file.

    Args:
        file: that is written.
        layout: dtype and shape by tensor name.
        tensors: names and values, each name of ``layout`` once, in any order.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide dtypes first, so that every tensor starts at a multiple of its width.
    for key in sorted(layout, key=lambda key: -layout[key][0].itemsize):
        dtype, shape = layout[key]
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[key] = {"dtype": names[dtype], "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with file.open("wb") as handle:
        handle.write(len(content).to_bytes(8, "little") + content)
        handle.truncate(8 + len(content) + end)
        for key, value in tensors:
            assert (value.dtype, tuple(value.shape)) == layout[key], f"{key} is not as announced"
            handle.seek(8 + len(content) + header[key]["data_offsets"][0])
            flat: Any = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            handle.write(memoryview(flat))


def save_sharded(
    folder: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a checkpoint as ``transformers`` does: one file, or shards with an index.

    Args:
        folder: existing folder.
        layout: dtype and shape per tensor, in the order ``tensors`` yields them.
        tensors: names and values.
        max_shard_bytes: size that no shard exceeds unless a single tensor does.
    """
    sizes = {
        name: dtype.itemsize * torch.Size(shape).numel() for name, (dtype, shape) in layout.items()
    }
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if used and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = (
            SINGLE_FILE
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        shard = {name: layout[name] for name in names}
        write_tensors(folder / file, shard, itertools.islice(stream, len(names)))
        weight_map |= dict.fromkeys(names, file)
    # Run the iterator to its end: it may do more after its last tensor.
    assert next(stream, None) is None, "more tensors than announced"
    if len(shards) > 1:
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": weight_map,
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
