"""The files of a data set that is a folder."""

import os
from collections.abc import Iterator
from pathlib import Path

# Folders and files that programs leave behind, some of them with copies of images.
_LEFTOVERS = frozenset(
    (
        *(".git", ".ipynb_checkpoints", ".cache", "__macosx", "@eadir", ".trashes"),
        *(".ds_store", "thumbs.db", "desktop.ini"),
    )
)
# The first bytes of the files that macOS writes next to others, with their names behind ``._``.
_APPLE_DOUBLE = b"\x00\x05\x16\x07"


def files_below(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the files below a folder, sorted, and whether a program left them; follow links.

    A folder that a program left is yielded as one file.

    Raises:
        OSError: a folder cannot be read.
    """
    return _walk(folder, (os.path.realpath(folder),))


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[tuple[Path, bool]]:
    """Yield files; ``above`` are real paths of folders around them: links in a circle end."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = folder / entry.name
        if entry.name.lower() in _LEFTOVERS:
            yield path, True
        elif entry.is_dir():
            real = os.path.realpath(path)
            if real not in above:
                yield from _walk(path, (*above, real))
        elif entry.is_file():
            yield path, entry.name.startswith("._") and _first_bytes(path) == _APPLE_DOUBLE
        elif entry.is_symlink():
            # It leads nowhere: a file that should be there.
            yield path, False


def _first_bytes(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(len(_APPLE_DOUBLE))
