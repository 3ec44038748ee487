"""Fenced code blocks of the documentation's pages."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
_FENCE = re.compile(r"^```(\w+)(?: title=\"(.+?)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: behind its fence.
        file: its title; empty without one.
        text: between its fences.
    """

    language: str
    file: str
    text: str


def blocks_of(page: str) -> Iterator[Block]:
    """Yield the blocks of a page that name a language, in order."""
    for language, file, text in _FENCE.findall((DOCS / page).read_text()):
        yield Block(language, file, text)
