"""Reading and writing Hugging Face folders of safetensors, tensor by tensor."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from epmq_deploy.errors import RecipeError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model"]
_SETTINGS = {".json", ".txt", ".model", ".jinja"}
_NOT_SETTINGS = {INDEX_FILE, "manifest.json", "report.json", "eval.json"}
_FILES = (".parquet", ".json", ".jsonl", ".csv", ".safetensors", ".yaml")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor's place and type.

    Attributes:
        file: safetensors file that holds it.
        key: its name in that file.
        shape: its shape.
        dtype: its dtype.
        offset: of its first byte in the file.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model folder by canonical name; nothing is read until asked for.

    Attributes:
        folder: the Hugging Face folder.
        tensors: canonical name to stored tensor.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path, rename: Callable[[str], str] = lambda key: key) -> "Checkpoint":
        """List the tensors of ``folder``, single or sharded.

        Args:
            folder: a Hugging Face model folder.
            rename: stored name to canonical name.

        Raises:
            RecipeError: the folder holds no safetensors, or a file of it cannot be read.
        """
        tensors = {}
        for file in weight_files(folder):
            try:
                with safe_open(file, framework="pt") as handle:
                    offsets = _offsets(file)
                    for key in handle.keys():  # noqa: SIM118 - no mapping
                        view = handle.get_slice(key)
                        dtype = _DTYPES.get(view.get_dtype())
                        if dtype is None:
                            raise RecipeError(
                                f"{file}: tensor {key!r} has dtype {view.get_dtype()}, "
                                f"supported: {', '.join(_DTYPES)}"
                            )
                        shape = tuple(view.get_shape())
                        tensors[rename(key)] = TensorInfo(file, key, shape, dtype, offsets[key])
            except (OSError, SafetensorError) as error:
                raise RecipeError(f"{file}: not readable as safetensors ({error})") from error
        return cls(folder, tensors)

    def load(self, name: str) -> Tensor:
        """One tensor as stored, CPU."""
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        self.load_into(name, tensor)
        return tensor

    def load_into(self, name: str, target: Tensor) -> None:
        """Overwrite ``target`` with one tensor, converted to its dtype and device.

        Read straight into memory that is there already: mapping the file anew for every tensor
        takes several times as long, and mapping it once keeps its pages resident.
        """
        info = self.tensors[name]
        if target.dtype != info.dtype or not target.is_contiguous() or target.device.type != "cpu":
            target.copy_(self.load(name))
            return
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset)
            flat: Any = target.detach().reshape(-1).view(torch.uint8).numpy()
            content = memoryview(flat)
            while content:
                read = file.readinto(content)
                if not read:
                    raise RecipeError(f"{info.file}: ends within tensor {info.key!r}")
                content = content[read:]


def _offsets(file: Path) -> dict[str, int]:
    """Where each tensor begins: the layout of safetensors, whose header ``safe_open`` validates."""
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
    return {
        key: 8 + size + entry["data_offsets"][0]
        for key, entry in header.items()
        if key != "__metadata__"
    }


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder.

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
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickled:
        raise RecipeError(
            f"{folder}: only pickled weights ({pickled[0]}), which are never loaded; convert them: "
            f'python -c "from transformers import AutoModel; '
            f"AutoModel.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise RecipeError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}")


def fetch_model(path_or_id: str) -> Path:
    """A local folder as it is, or a hub id's snapshot (safetensors and settings only).

    Raises:
        RecipeError: neither a folder nor an id the hub can deliver.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    if not looks_like_hub_id(path_or_id):
        raise RecipeError(f"{path_or_id}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_id, allow_patterns=_HUB_PATTERNS))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(
            f"{path_or_id}: no such folder, and the hub did not deliver it ({reason})"
        ) from error


def looks_like_hub_id(text: str) -> bool:
    """Whether ``text`` has the form ``owner/name`` of a hub id, and not that of a file."""
    shaped = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    return shaped and not text.endswith(("/", *_FILES))


def setting_files(folder: Path) -> tuple[Path, ...]:
    """Everything a model folder holds beside its weights: config, tokenizer, processor."""
    return tuple(
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.suffix in _SETTINGS and file.name not in _NOT_SETTINGS
    )


def copy_settings(source: Path, target: Path) -> None:
    """Copy config, tokenizer and processor files."""
    for file in setting_files(source):
        shutil.copyfile(file, target / file.name)


def save_sharded(
    folder: Path,
    sizes: Mapping[str, int],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write tensors as they come, a shard at a time, in the Hugging Face layout.

    Args:
        folder: existing folder.
        sizes: bytes per tensor, in the order ``tensors`` yields them.
        tensors: names and values; at most one shard is held in memory.
        max_shard_bytes: a shard is closed before it would exceed this.
    """
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
        shard = dict(next(stream) for _ in names)
        save_file(
            {name: value.contiguous() for name, value in shard.items()},
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": weight_map,
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
