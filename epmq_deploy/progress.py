"""How long work reports progress without knowing a terminal."""

from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Wraps an iterable and shows how far it got."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield ``items`` unchanged; ``total`` is needed where ``items`` has no length."""
        ...


class NoProgress:
    """Shows nothing."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """See ``Progress``."""
        yield from items


def length_of(items: Iterable[object], total: int | None) -> int | None:
    """``total``, or the length where there is one."""
    if total is None and isinstance(items, Sized):
        return len(items)
    return total
