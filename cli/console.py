"""Terminal output: progress and logs on stderr, results on stdout.

``rich`` is imported when something is printed, so that commands start without it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from epmq_deploy.progress import length_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

T = TypeVar("T")


@dataclass(frozen=True)
class Terminal:
    """Where a command reports: nothing but errors when quiet, plain JSON on request.

    Attributes:
        as_json: print results as JSON instead of tables.
        quiet: show neither progress nor tables.
    """

    as_json: bool
    quiet: bool

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield ``items`` under a progress bar, unless quiet or stderr is not a terminal."""
        console = stderr_console()
        if self.quiet or not console.is_terminal:
            yield from items
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        columns = (
            TextColumn("{task.description:>16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            yield from bars.track(items, total=length_of(items, total), description=description)

    def result(self, data: Mapping[str, Any], table: RenderableType) -> None:
        """Print a command's result to stdout: ``data`` as JSON, or ``table``."""
        if self.as_json:
            print(json.dumps(data, indent=2))
        elif not self.quiet:
            from rich.console import Console

            Console().print(table)


def print_error(message: str) -> None:
    """Print an error to stderr."""
    print(f"error: {message}", file=sys.stderr)


def stderr_console() -> Console:
    """Return a console on stderr."""
    from rich.console import Console

    return Console(stderr=True)
