"""The base of every option model, and unions of them built from registries."""

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import reduce
from operator import or_
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Options(BaseModel):
    """Frozen options; unknown keys are errors. Recipe keys and CLI flags both come from these."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def without_effect(section: str, idle: Mapping[str, str]) -> list[str]:
    """One sentence for the options of a recipe's section that have none for the same reason."""
    sentences = []
    for why in dict.fromkeys(idle.values()):
        names = [f"{section}.{name}" for name, reason in idle.items() if reason == why]
        has, them = ("has", "it") if len(names) == 1 else ("have", "them")
        sentences.append(f"{', '.join(names)} {has} no effect {why}; leave {them} out")
    return sentences


def shared_fields(first: type[Options], second: type[Options]) -> set[str]:
    """Options both classes inherit from a common base, so that they mean the same in both."""
    common = set(first.__mro__) & set(second.__mro__)
    return {name for base in common if issubclass(base, Options) for name in base.model_fields}


def union_by_method(members: Iterable[type[Options]]) -> Any:
    """A pydantic type accepting any of ``members``, told apart by their ``method`` field."""
    return Annotated[reduce(or_, members), Field(discriminator="method")]


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


def given_for(layers: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Options that patterns give to one name; of two that match the later one counts."""
    own: dict[str, Any] = {}
    for pattern, given in layers.items():
        if fnmatchcase(name, pattern):
            own |= given
    return own
