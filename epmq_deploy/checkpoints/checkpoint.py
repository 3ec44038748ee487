"""Reading and writing Hugging Face folders of safetensors, tensor by tensor."""

import itertools
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.checkpoints.hub import fetch_snapshot, hub_id
from epmq_deploy.checkpoints.lora import ADAPTER_CONFIG, ADAPTER_FILE, adapted_tensors
from epmq_deploy.checkpoints.open_clip import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_FILES,
    clip_config,
    open_clip_tensors,
    processor_config,
)
from epmq_deploy.checkpoints.open_clip_weights import named_folder, split_named
from epmq_deploy.checkpoints.pickle_conversion import (
    SINGLE_FILE,
    refuse_pickled,
    refuse_pickled_file,
)
from epmq_deploy.checkpoints.tensors import (
    Rename,
    TensorInfo,
    same_values,
    stored_tensors,
    write_tensors,
)
from epmq_deploy.errors import RecipeError

INDEX_FILE = "model.safetensors.index.json"
_SETTINGS = {".json", ".txt", ".model", ".jinja"}
_NOT_SETTINGS = {INDEX_FILE, "manifest.json", "report.json", "eval.json"}


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model by canonical name; nothing is read until asked for.

    Attributes:
        folder: the model folder.
        tensors: canonical name to tensor.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(
        cls,
        folder: Path,
        rename: Rename = lambda key: key,
        tied: Mapping[str, str] = MappingProxyType({}),
    ) -> "Checkpoint":
        """List the tensors of ``folder``, single or sharded.

        Args:
            folder: a Hugging Face model folder, or one in the layout of ``open_clip``.
            rename: stored name (for ``open_clip``, that of ``transformers``' CLIP) to canonical.
            tied: canonical names of tensors that may be copies of others, to those of the others;
                copies are left out.

        Raises:
            RecipeError: the folder holds no safetensors, or a file of it cannot be read.
            MismatchError: it holds what an ``open_clip`` model does not.
        """
        files = weight_files(folder)
        if is_open_clip(folder):
            return cls(folder, open_clip_tensors(files[0], rename))
        tensors = stored_tensors(files, rename)
        for copy, original in tied.items():
            if copy in tensors and original in tensors:
                if same_values(tensors[copy], tensors[original]):
                    del tensors[copy]
            elif copy in tensors:
                tensors[original] = tensors.pop(copy)
        return cls(folder, tensors)

    @classmethod
    def open_expert(
        cls,
        folder: Path,
        base: "Checkpoint",
        rename: Rename,
        tied: Mapping[str, str] = MappingProxyType({}),
    ) -> "Checkpoint":
        """List an expert's tensors: its own, or the base's with its LoRA adapter applied.

        Args:
            folder: a model folder, or one with a ``peft`` adapter.
            base: what an adapter is applied to.
            rename: stored name to canonical name.
            tied: see ``open``.

        Raises:
            RecipeError: the folder holds no safetensors, or no plain LoRA adapter.
            MismatchError: the adapter does not fit the base.
        """
        if not is_adapter(folder):
            return cls.open(folder, rename, tied)
        config = read_json(folder / ADAPTER_CONFIG)
        return cls(folder, adapted_tensors(folder, config, base.tensors, rename))

    def load(self, name: str) -> Tensor:
        """One tensor in its own dtype, CPU."""
        return self.tensors[name].load()

    def load_into(self, name: str, target: Tensor) -> None:
        """Overwrite ``target`` with one tensor, converted to its dtype and device."""
        info = self.tensors[name]
        if target.dtype != info.dtype or not target.is_contiguous() or target.device.type != "cpu":
            target.copy_(info.load())
        else:
            info.read_into(target)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a ``peft`` adapter.

    Raises:
        RecipeError: it holds a whole model too.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    whole = [name for name in (SINGLE_FILE, INDEX_FILE) if (folder / name).is_file()]
    if whole:
        raise RecipeError(
            f"{folder}: holds both an adapter ({ADAPTER_CONFIG}) and a whole model ({whole[0]}); "
            "move one of them elsewhere"
        )
    return True


def is_open_clip(folder: Path) -> bool:
    """Whether a folder holds a model in the layout of ``open_clip`` alone."""
    theirs = (folder / OPEN_CLIP_CONFIG).is_file()
    return theirs and not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


def expert_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of an expert: a model folder's, or an adapter's.

    Raises:
        RecipeError: see ``weight_files`` and ``is_adapter``.
    """
    if not is_adapter(folder):
        return weight_files(folder)
    file = folder / ADAPTER_FILE
    if not file.is_file():
        refuse_pickled(folder)
        raise RecipeError(f"{folder}: no {ADAPTER_FILE} beside {ADAPTER_CONFIG}")
    return (file,)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder with a whole model.

    Raises:
        RecipeError: none there, or shards missing; names the conversion for pickled weights.
    """
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"{index}: not an index of safetensors shards") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise RecipeError(f"{folder}: shards missing: {', '.join(missing)}")
        return tuple(folder / name for name in names)
    if is_open_clip(folder):
        for name in OPEN_CLIP_FILES:
            if (folder / name).is_file():
                return (folder / name,)
        refuse_pickled(folder)
        raise RecipeError(f"{folder}: {OPEN_CLIP_CONFIG}, but no {' or '.join(OPEN_CLIP_FILES)}")
    if is_adapter(folder):
        raise RecipeError(f"{folder}: an adapter, where a whole model is needed")
    refuse_pickled(folder)
    raise RecipeError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}")


def fetch_model(path_or_id: str) -> Path:
    """A local folder as it is, or one made of what else names a model.

    Args:
        path_or_id: a folder; a hub id, of which safetensors and settings are fetched, with
            ``@revision`` where it is not the main branch; or ``open_clip:NAME=PATH``.

    Raises:
        RecipeError: none of these, or what the hub cannot deliver; names the conversion for pickled
            weights.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    named = split_named(path_or_id)
    if named is not None:
        return named_folder(named[0], Path(named[1]))
    if folder.is_file():
        refuse_pickled_file(folder, "the folder")
        raise RecipeError(f"{folder}: a file, where a model folder is needed")
    wanted = hub_id(path_or_id)
    if wanted is None:
        raise RecipeError(f"{path_or_id}: no such folder")
    return fetch_snapshot(wanted)


def model_config(folder: Path) -> dict[str, Any] | None:
    """A model folder's ``config.json``, or what follows from ``open_clip``'s; None without either.

    Raises:
        RecipeError: it is no JSON object, or describes an ``open_clip`` model that is no CLIP.
    """
    if is_open_clip(folder):
        file = folder / OPEN_CLIP_CONFIG
        return clip_config(read_json(file), file)
    file = folder / "config.json"
    return read_json(file) if file.is_file() else None


def preprocessor_config(folder: Path) -> dict[str, Any] | None:
    """As ``model_config``, of ``preprocessor_config.json``."""
    if is_open_clip(folder):
        file = folder / OPEN_CLIP_CONFIG
        return processor_config(read_json(file), file)
    file = folder / "preprocessor_config.json"
    return read_json(file) if file.is_file() else None


def read_json(file: Path) -> dict[str, Any]:
    """A file with a JSON object.

    Raises:
        RecipeError: it is none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: no JSON object")
    return content


def setting_files(folder: Path) -> tuple[Path, ...]:
    """Everything a model folder holds beside its weights: config, tokenizer, processor."""
    return tuple(
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.suffix in _SETTINGS and file.name not in _NOT_SETTINGS
    )


def copy_settings(source: Path, target: Path) -> None:
    """Copy config, tokenizer and processor files; those of ``open_clip`` as ``transformers``'."""
    for file in setting_files(source):
        if file.name != OPEN_CLIP_CONFIG:
            shutil.copyfile(file, target / file.name)
    if is_open_clip(source):
        made = {"config": model_config(source), "preprocessor_config": preprocessor_config(source)}
        for name, content in made.items():
            (target / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def save_sharded(
    folder: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write tensors as they come, one at a time in memory, in the Hugging Face layout.

    Args:
        folder: existing folder.
        layout: dtype and shape per tensor, in the order ``tensors`` yields them.
        tensors: names and values.
        max_shard_bytes: a shard is closed before it would exceed this.
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
    # What yields the tensors may still have to end.
    assert next(stream, None) is None, "more tensors than announced"
    if len(shards) > 1:
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": weight_map,
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
