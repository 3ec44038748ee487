"""What a person sees: progress and log on stderr, results on stdout."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from epmq_deploy.progress import length_of

T = TypeVar("T")


@dataclass(frozen=True)
class Terminal:
    """How a command reports: nothing but errors when quiet, plain JSON on request."""

    as_json: bool
    quiet: bool

    def __post_init__(self) -> None:
        logger = logging.getLogger("epmq_deploy")
        handler = RichHandler(console=_stderr(), show_path=False, show_time=False)
        logger.handlers = [handler]
        logger.setLevel(logging.ERROR if self.quiet else logging.INFO)
        logger.propagate = False
        _quieten_libraries()

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """A progress bar on stderr; off when quiet or not a terminal."""
        console = _stderr()
        if self.quiet or not console.is_terminal:
            yield from items
            return
        columns = (
            TextColumn("{task.description:>16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with RichProgress(*columns, console=console, transient=True) as bars:
            yield from bars.track(items, total=length_of(items, total), description=description)

    def result(self, data: dict[str, Any], shown: RenderableType) -> None:
        """Print a command's result to stdout, as JSON or for a person."""
        if self.as_json:
            print(json.dumps(data, indent=2))
        elif not self.quiet:
            Console().print(shown)


def fail(message: str) -> None:
    """Print an error to stderr."""
    print(f"error: {message}", file=sys.stderr)


def _stderr() -> Console:
    return Console(stderr=True)


def _quieten_libraries() -> None:
    """Keep other libraries' notices off the terminal; what matters is reported by this one."""
    # Read when transformers is imported, which happens later.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    for name in ("transformers", "datasets", "torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
