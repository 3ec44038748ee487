"""Hashes of files."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path


def file_sha256(file: Path) -> str:
    """sha256 of a file's bytes."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def files_sha256(
    folder: Path, files: Iterable[Path], of_file: Callable[[Path], str] = file_sha256
) -> str:
    """One sha256 over paths (relative to ``folder``) and contents of several files.

    Args:
        folder: that paths are relative to.
        files: within it.
        of_file: gives a file's sha256.
    """
    digest = hashlib.sha256()
    for name in sorted(file.relative_to(folder).as_posix() for file in files):
        # Names may hold bytes that are no text.
        line = f"{name} {of_file(folder / name)}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()
