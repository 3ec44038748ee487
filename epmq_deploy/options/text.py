"""Options as command lines give them: text that holds several values or a mapping."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BeforeValidator

from epmq_deploy.options.yaml_document import read_yaml


def split_entries(texts: Iterable[str], start: str = "") -> list[str]:
    """Return the entries of texts, each of which may hold several separated by commas.

    Args:
        texts: the values of a flag that may be repeated.
        start: pattern that every entry begins with, if entries may themselves hold commas.
    """
    comma = re.compile(rf",(?=\s*{start})")
    return [entry.strip() for text in texts for entry in comma.split(str(text))]


def refuse_repeated(values: Iterable[object]) -> None:
    """Make sure that no value comes twice.

    Raises:
        ValueError: names those that do.
    """
    repeated = [text for text, count in Counter(map(str, values)).items() if count > 1]
    if repeated:
        raise ValueError(f"{', '.join(repeated)} is given twice; keep one of them")


def _items(value: Any) -> Any:
    """Flatten a value, a list or comma-separated strings into a list."""
    if value is None:
        return None
    items = value if isinstance(value, list | tuple) else [value]
    entries = [
        entry
        for item in items
        for entry in (split_entries([item]) if isinstance(item, str) else [item])
    ]
    refuse_repeated(entries)
    return entries


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
        ValueError: an entry of another form, or a pattern or one of its options given twice.
    """
    layers = []
    for entry in split_entries(entries, start="[^,=]*:"):
        pattern, colon, assignments = entry.rpartition(":")
        pairs = [item.partition("=") for item in assignments.split(",")]
        if not colon or not all(equals for _, equals, _ in pairs):
            raise ValueError(f"{entry!r} is not of the form PATTERN:option=value,...")
        options = [key.strip().replace("-", "_") for key, _, _ in pairs]
        refuse_repeated(f"{pattern}:{option}" for option in options)
        values = [read_yaml(text).content for _, _, text in pairs]
        layers.append((pattern, dict(zip(options, values, strict=True))))
    refuse_repeated(pattern for pattern, _ in layers)
    return dict(layers)


def numbers_from_text(entries: Iterable[str]) -> dict[str, str]:
    """Read ``NAME=NUMBER`` entries, which commas may separate, as a mapping.

    Raises:
        ValueError: an entry of another form, or a name given twice.
    """
    numbers = []
    for entry in split_entries(entries):
        name, equals, number = entry.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{entry!r} is not of the form NAME=NUMBER")
        numbers.append((name.strip(), number.strip()))
    refuse_repeated(name for name, _ in numbers)
    return dict(numbers)
