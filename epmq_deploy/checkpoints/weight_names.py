"""Which safetensors files of a folder hold the weights of its model, whatever they are called."""

import logging
import re
from functools import lru_cache
from pathlib import Path, PurePosixPath

from epmq_deploy.checkpoints.files import INDEX_FILE, SINGLE_FILE, read_json
from epmq_deploy.errors import RecipeError

# What programs call the one file of a model, in the order in which they are looked for.
SINGLE_FILES = (SINGLE_FILE, "pytorch_model.safetensors", "consolidated.safetensors")
_SUFFIX = ".safetensors"
_INDEX_SUFFIX = f"{_SUFFIX}.index.json"
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
# Files of other things than a model's weights.
_OTHERS = re.compile(r"(adapter_|optimizer|scheduler|training_|open_clip_|heads\.|random_states).*")

# Formats of weights that are not read, by suffix.
_FORMATS = {
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".tflite": "TFLite",
    ".npz": "NumPy",
}

log = logging.getLogger(__name__)


def has_usual_names(folder: Path) -> bool:
    """Tell whether a folder holds a whole model under one of the usual names."""
    return any((folder / name).is_file() for name in (INDEX_FILE, *SINGLE_FILES))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """List the one file, or all shards; none where there are none.

    What is taken under an unusual name is said in the log.

    Raises:
        RecipeError: shards are missing, or it is not clear which file is meant.
    """
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    if (folder / INDEX_FILE).is_file():
        return _of_index(folder / INDEX_FILE)
    others = _others(folder)
    if others:
        _say(folder, ", ".join(file.name for file in others[:1]), len(others))
    return others


def refuse_other_formats(given: Path) -> None:
    """Refuse a file, or a folder that holds nothing else, with weights in another format.

    Raises:
        RecipeError: names the format.
    """
    files = sorted(given.iterdir()) if given.is_dir() else [given]
    for file in files:
        if name := _FORMATS.get(file.suffix.lower()):
            raise RecipeError(
                f"{file}: weights in the format of {name}, which are not read; give the model's "
                "safetensors"
            )


def _others(folder: Path) -> tuple[Path, ...]:
    """List the files of a folder without those that ``transformers`` looks for."""
    indexes = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    if len(indexes) == 1:
        return _of_index(indexes[0])
    files = [file for file in sorted(folder.glob(f"*{_SUFFIX}")) if not _OTHERS.match(file.name)]
    usual = [folder / name for name in SINGLE_FILES if folder / name in files]
    if usual or len(files) < 2:
        return tuple(usual or files)[:1]
    shards = [_SHARD.fullmatch(file.name) for file in files]
    if all(shards) and len({(shard[1], shard[3]) for shard in shards if shard}) == 1:
        total = int(shards[0][3]) if shards[0] else 0
        present = {int(shard[2]) for shard in shards if shard}
        if missing := sorted(set(range(1, total + 1)) - present):
            numbers = ", ".join(map(str, missing))
            raise RecipeError(f"{folder}: shards missing: {numbers} of {total}")
        return tuple(files)
    raise RecipeError(
        f"{folder}: several files could be the model ({', '.join(file.name for file in files)}); "
        f"call the one that is meant {SINGLE_FILE}, or keep it in a folder of its own"
    )


def _of_index(index: Path) -> tuple[Path, ...]:
    """List the shards that an index names."""
    try:
        names = sorted(set(map(str, read_json(index)["weight_map"].values())))
    except (KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{index}: not an index of safetensors shards") from error
    outside = [name for name in names if PurePosixPath(name).name != name]
    if outside:
        raise RecipeError(f"{index}: names files outside its folder: {', '.join(outside)}")
    present = {file.name for file in index.parent.iterdir() if file.is_file()}
    missing = [name for name in names if name not in present]
    if missing:
        raise RecipeError(f"{index.parent}: shards missing: {', '.join(missing)}")
    return tuple(index.parent / name for name in names)


@lru_cache(maxsize=256)
def _say(folder: Path, first: str, count: int) -> None:
    more = f" and {count - 1} more file(s)" if count > 1 else ""
    log.info("%s: no %s; the weights are read from %s%s", folder, SINGLE_FILE, first, more)
