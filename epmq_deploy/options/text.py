"""Options as command lines give them: texts that hold several values or a mapping."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import yaml
from pydantic import BeforeValidator


def split_entries(texts: Iterable[str], start: str = "") -> list[str]:
    """Entries of texts, each of which may hold several separated by commas.

    Args:
        texts: as a flag that may be repeated gives them.
        start: pattern of what every entry begins with, where entries may hold commas themselves.
    """
    comma = re.compile(rf",(?=\s*{start})")
    return [entry.strip() for text in texts for entry in comma.split(str(text))]


def _items(value: Any) -> Any:
    """Items of a list, those of texts among them; a value that is no list is one of its own."""
    if value is None:
        return None
    items = value if isinstance(value, list | tuple) else [value]
    return [
        entry
        for item in items
        for entry in (split_entries([item]) if isinstance(item, str) else [item])
    ]


# Of an option that takes several values: a list, one value, or texts with commas between values.
SEVERAL = BeforeValidator(_items)


def texts_read_by(parse: Callable[[Iterable[str]], Any]) -> BeforeValidator:
    """Lets a mapping be given as command lines give it: as one or more texts for ``parse``."""

    def read(value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        return parse(texts) if isinstance(texts, list | tuple) else value

    return BeforeValidator(read)


def layers_from_text(entries: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``PATTERN:option=value,...`` entries, several of them separated by commas, as a mapping.

    Raises:
        ValueError: an entry of another form.
    """
    found = {}
    for entry in split_entries(entries, start="[^,=]*:"):
        pattern, colon, assignments = entry.rpartition(":")
        pairs = [item.partition("=") for item in assignments.split(",")]
        if not colon or not all(equals for _, equals, _ in pairs):
            raise ValueError(f"{entry!r} is not of the form PATTERN:option=value,...")
        found[pattern] = {
            key.strip().replace("-", "_"): yaml.safe_load(text) for key, _, text in pairs
        }
    return found


def numbers_from_text(entries: Iterable[str]) -> dict[str, str]:
    """``NAME=NUMBER`` entries, several of them separated by commas, as a mapping.

    Raises:
        ValueError: an entry of another form.
    """
    found = {}
    for entry in split_entries(entries):
        name, equals, number = entry.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{entry!r} is not of the form NAME=NUMBER")
        found[name.strip()] = number.strip()
    return found
