"""Image files that a table lists by their paths."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from epmq_deploy.data.rows import load_rows
from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import DataSource

# Bytes at the beginning and end of a table that are searched for names of images.
_SEARCHED = 2**16
_SUFFIXES = (b".png", b".jp", b".bmp", b".tif", b".webp", b".gif", b".ppm", b".pgm")


def listed_images(source: DataSource) -> list[Path]:
    """Return the existing files that a data source's file lists, without repetition, in order.

    Relative paths start from the folder of that file. None for tables of texts or of stored images,
    and for what cannot be read, which is reported where its samples are loaded.
    """
    file = Path(source.path)
    if not _names_images(file):
        return []
    try:
        rows = load_rows("", source)
    except RecipeError:
        return []
    given = source.input_column
    names = [given] if given is not None and given in rows.column_names else rows.column_names
    paths = (file.parent / text for name in names for text in _texts(rows, name))
    return list(dict.fromkeys(path for path in paths if _is_file(path)))


def _names_images(file: Path) -> bool:
    with file.open("rb") as handle:
        start = handle.read(_SEARCHED)
        handle.seek(max(0, file.stat().st_size - _SEARCHED))
        ends = (start + handle.read()).lower()
    return any(suffix in ends for suffix in _SUFFIXES)


def _texts(rows: Any, column: str) -> Iterator[str]:
    """Yield the texts of a column, or the paths in it; nothing of a column of anything else."""
    feature = rows.features[column]
    stores_paths = isinstance(feature, dict) and "path" in feature and "bytes" not in feature
    if not stores_paths and getattr(feature, "dtype", None) not in ("string", "large_string"):
        return
    for value in rows.select_columns([column])[column]:
        text = value.get("path") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            yield text


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # texts that are no names of files
        return False
