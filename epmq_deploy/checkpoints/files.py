"""Names of the files in a model folder, and reading its JSON files."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from epmq_deploy.errors import EpmqError, RecipeError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
# Of tokenizer and image processor together; the image processor's settings are in its section.
PROCESSOR_FILE = "processor_config.json"
IMAGE_SECTION = "image_processor"
# The last ones are those of tokenizers.
SETTINGS_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".codes", ".bpe", ".spm", ".tiktoken")
_NOT_SETTINGS = {"manifest.json", "report.json", "eval.json"}
_INDEX_SUFFIX = ".index.json"
# No model has more blocks; building one with a nonsensical number would not end.
_MOST_LAYERS = 10_000

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")


def read_json(file: Path) -> dict[str, Any]:
    """Read a file with a JSON object.

    Raises:
        RecipeError: it holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{file}: not JSON ({error})") from error
    except RecursionError as error:
        raise RecipeError(f"{file}: not JSON that can be read (nested too deeply)") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: not a JSON object")
    return content


def read_json_if_there(file: Path) -> dict[str, Any] | None:
    """Read a file with a JSON object; None where there is no such file.

    Raises:
        RecipeError: it holds something else.
    """
    return read_json(file) if file.is_file() else None


def check_sizes(config: dict[str, Any], file: Path) -> None:
    """Make sure that a config's numbers of layers are numbers of layers.

    Raises:
        RecipeError: names the key.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            check_sizes(value, file)
        elif key.endswith("layers") and isinstance(value, int) and not 0 <= value < _MOST_LAYERS:
            raise RecipeError(f"{file}: {key} is {value}, which is no number of layers")


@contextmanager
def usable_settings(folder: Path, files: str = "config.json") -> Iterator[None]:
    """Raise an error that names a folder in place of whatever its settings lead a library to.

    Libraries take settings as they come; what they raise for odd ones has no common base.

    Args:
        folder: whose settings the block uses.
        files: which of them, for the message.

    Raises:
        RecipeError: in place of any error that is not ours.
    """
    try:
        yield
    except EpmqError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"{folder}: {files} cannot be used ({type(error).__name__}: {reason})"
        ) from error


def uses_settings(
    method: Callable[Concatenate[S, Path, P], R],
) -> Callable[Concatenate[S, Path, P], R]:
    """Run a method of a folder within ``usable_settings``."""

    @wraps(method)
    def wrapper(self: S, folder: Path, *args: P.args, **kwargs: P.kwargs) -> R:
        with usable_settings(folder):
            return method(self, folder, *args, **kwargs)

    return cast(Callable[Concatenate[S, Path, P], R], wrapper)


def setting_files(folder: Path) -> tuple[Path, ...]:
    """List everything a model folder holds next to its weights: config, tokenizer, processor."""
    return tuple(
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.suffix in SETTINGS_SUFFIXES
        and file.name not in _NOT_SETTINGS
        and not file.name.endswith(_INDEX_SUFFIX)
    )
