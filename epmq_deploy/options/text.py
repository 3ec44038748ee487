"""Options as command lines give them: text that holds several values or a mapping."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import yaml
from pydantic import BeforeValidator


def split_entries(texts: Iterable[str], start: str = "") -> list[str]:
    """Return the entries of texts, each of which may hold several separated by commas.

    Args:
        texts: the values of a flag that may be repeated.
        start: pattern that every entry begins with, if entries may themselves hold commas.
    """
    comma = re.compile(rf",(?=\s*{start})")
    return [entry.strip() for text in texts for entry in comma.split(str(text))]


def _items(value: Any) -> Any:
    """Flatten a value, a list or comma-separated strings into a list."""
    if value is None:
        return None
    items = value if isinstance(value, list | tuple) else [value]
    return [
        entry
        for item in items
        for entry in (split_entries([item]) if isinstance(item, str) else [item])
    ]


# For an option that takes several values: a list, one value, or comma-separated strings.
SEVERAL = BeforeValidator(_items)


def texts_read_by(parse: Callable[[Iterable[str]], Any]) -> BeforeValidator:
    """Return a validator that accepts a mapping, or strings that ``parse`` reads as one."""

    def read(value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        return parse(texts) if isinstance(texts, list | tuple) else value

    return BeforeValidator(read)


def layers_from_text(entries: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read ``PATTERN:option=value,...`` entries, which commas may separate, as a mapping.

    Raises:
        ValueError: an entry of another form.
    """
    layers = {}
    for entry in split_entries(entries, start="[^,=]*:"):
        pattern, colon, assignments = entry.rpartition(":")
        pairs = [item.partition("=") for item in assignments.split(",")]
        if not colon or not all(equals for _, equals, _ in pairs):
            raise ValueError(f"{entry!r} is not of the form PATTERN:option=value,...")
        layers[pattern] = {
            key.strip().replace("-", "_"): yaml.safe_load(text) for key, _, text in pairs
        }
    return layers


def numbers_from_text(entries: Iterable[str]) -> dict[str, str]:
    """Read ``NAME=NUMBER`` entries, which commas may separate, as a mapping.

    Raises:
        ValueError: an entry of another form.
    """
    numbers = {}
    for entry in split_entries(entries):
        name, equals, number = entry.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{entry!r} is not of the form NAME=NUMBER")
        numbers[name.strip()] = number.strip()
    return numbers
