"""Disk space: refused before work where it cannot suffice, one sentence where it runs out."""

import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from epmq_deploy.errors import DiskSpaceError, EpmqError

# Libraries hide the system's error: safetensors in text, numpy and onnx-ir as a short write.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TEXTS = re.compile(r"No space left|os error (28|122)\b|Disk quota exceeded|\d+ requested and \d+ ")
# Where less than this is free, errors of any kind are taken to come from that.
_NOTHING_LEFT = 2**20


def require_space(folder: Path, needed: int, what: str) -> None:
    """Make sure that a disk has room for what is going to be written.

    Args:
        folder: to be written; need not exist yet.
        needed: bytes, rather too few than too many.
        what: is written, for the message.

    Raises:
        DiskSpaceError: says how much is needed, how much is free, and where.
    """
    existing = next(each for each in (folder, *folder.resolve().parents) if each.exists())
    try:
        usage = shutil.disk_usage(existing)
    except OSError:
        return
    # Some network file systems report sizes of zero.
    if usage.total and usage.free < needed:
        raise DiskSpaceError(
            f"{folder}: {what} needs at least {size_text(needed)} and {size_text(usage.free)} are "
            "free there; free some space, or choose an output on another disk"
        )


@contextmanager
def explaining_full_disk(folder: Path) -> Iterator[None]:
    """Raise ``DiskSpaceError`` in place of what the block raises for lack of disk space.

    Args:
        folder: that the block writes to, in addition to temporary files.
    """
    try:
        yield
    except DiskSpaceError:
        raise
    except Exception as error:
        free = _free(folder)
        # Errors with a sentence of their own may come from a file that was cut short.
        if not _says_full(error) and (isinstance(error, EpmqError) or free > _NOTHING_LEFT):
            raise
        temporary = Path(tempfile.gettempdir())
        where = temporary if _free(temporary) < min(free, _NOTHING_LEFT) else folder.parent
        raise DiskSpaceError(
            f"{where}: the disk is full ({size_text(_free(where))} free); free some space and give "
            "the same command again"
        ) from error


def size_text(size: int) -> str:
    """Return bytes as people read them."""
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.2f} MB"


def _says_full(error: BaseException | None) -> bool:
    """Tell whether an error, or one that led to it, is about a lack of disk space."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if not isinstance(error, EpmqError) and _TEXTS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return _NOTHING_LEFT + 1
