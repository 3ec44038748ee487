"""Names of the files in a model folder, and reading its JSON files."""

import json
from pathlib import Path
from typing import Any

from epmq_deploy.errors import RecipeError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
# Of tokenizer and image processor together; the image processor's settings are in its section.
PROCESSOR_FILE = "processor_config.json"
IMAGE_SECTION = "image_processor"
_SETTINGS_SUFFIXES = {".json", ".txt", ".model", ".jinja"}
_NOT_SETTINGS = {"manifest.json", "report.json", "eval.json"}
_INDEX_SUFFIX = ".index.json"


def read_json(file: Path) -> dict[str, Any]:
    """Read a file with a JSON object.

    Raises:
        RecipeError: it holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: not a JSON object")
    return content


def read_json_if_there(file: Path) -> dict[str, Any] | None:
    """Read a file with a JSON object; None where there is no such file.

    Raises:
        RecipeError: it holds something else.
    """
    return read_json(file) if file.is_file() else None


def setting_files(folder: Path) -> tuple[Path, ...]:
    """List everything a model folder holds next to its weights: config, tokenizer, processor."""
    return tuple(
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.suffix in _SETTINGS_SUFFIXES
        and file.name not in _NOT_SETTINGS
        and not file.name.endswith(_INDEX_SUFFIX)
    )
