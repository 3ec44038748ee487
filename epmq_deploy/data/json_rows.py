"""JSON files whose rows are below one key, as ``{"version": "1.1", "data": [...]}``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def key_of_rows(file: Path, columns: frozenset[str]) -> str | None:
    """Return the only key of a file's one JSON object that holds a list of objects.

    None for any other file: a list, one row a line, no JSON, several such keys, or one row whose
    columns are the object's keys.

    Args:
        file: in UTF-8.
        columns: that the recipe names.
    """
    content = _object(file)
    if content is None or not columns.isdisjoint(content):
        return None
    keys = [key for key, value in content.items() if _holds_objects(value)]
    return keys[0] if len(keys) == 1 else None


def _object(file: Path) -> Mapping[str, Any] | None:
    with file.open(encoding="utf-8-sig") as handle:
        first = handle.readline()
        # Not read into memory as a whole: rows may be many.
        if first.lstrip().startswith("[") or (_parsed(first) is not None and handle.readline()):
            return None
        handle.seek(0)
        content = _parsed(handle.read())
    return content if isinstance(content, dict) else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
