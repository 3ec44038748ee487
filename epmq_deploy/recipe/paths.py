"""Paths as people write them: with ``~`` and environment variables."""

import os
import re
import sys
from pathlib import Path

from epmq_deploy.errors import RecipeError

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def expanded(path: str, folder: Path) -> Path:
    """Return a path with ``~``, ``$NAME`` and ``${NAME}`` replaced by what they stand for.

    A file or folder whose name has a ``$`` in it is taken as it is.

    Args:
        path: absolute, or seen from ``folder``.
        folder: that relative paths are seen from.

    Raises:
        ValueError: a variable is not set, a user does not exist, or no file can have such a path.
    """
    if not path or "\0" in path:
        raise ValueError("not a path")
    if "$" in path and not _exists(folder / path):
        path = os.path.expandvars(path)
        if unset := _VARIABLE.search(path):
            raise ValueError(f"environment variable {unset[1].strip('{}')} is not set")
    try:
        home = Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error).rstrip(".")) from error
    _exists(folder / home)
    return home


def absolute(path: Path) -> Path:
    """Return an absolute path without following links.

    A link has a name and neighbours, which the file in a content store that it leads to lacks.
    ``..`` after a link stays: its meaning depends on where the link leads.
    """
    whole = path.absolute()
    result = Path(whole.anchor)
    for part in whole.relative_to(whole.anchor).parts:
        if part == ".." and result.name not in ("", "..") and not result.is_symlink():
            result = result.parent
        else:
            result = result / part
    return result


def check_encoding(path: Path) -> None:
    """Make sure that every library can open a path: its name is text in the system's encoding.

    Raises:
        RecipeError: it has bytes that are no text, or characters that the encoding lacks.
    """
    try:
        os.fsencode(path)
        str(path).encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"{str(path)!a}: not a name in this system's encoding "
            f"({sys.getfilesystemencoding()}); rename it, or set the environment variable "
            "PYTHONUTF8=1"
        ) from error


def _exists(path: Path) -> bool:
    """Tell whether a file or folder is there.

    Raises:
        ValueError: the path is too long, or goes round in links.
    """
    try:
        return path.exists()
    except PermissionError:
        return False
    except (OSError, RuntimeError) as error:
        raise ValueError(getattr(error, "strerror", None) or str(error)) from error
