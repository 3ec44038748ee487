"""Locks of outputs: one run at a time writes a folder, and the others are told which.

The lock of ``out/merged`` is the file ``out/.merged.lock``. The operating system frees it when the
process that holds it ends, however it ends; the file says which process that is. Where a lock's
file is left by another machine, which may hold it in a way this one does not see, it stays locked.
"""

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any

from epmq_deploy.errors import RecipeError

log = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# On Windows a lock keeps others from reading what it covers: a byte that is never written.
_LOCKED_BYTE = 1 << 20
# Between taking a lock and saying who took it, and between a file's deletion and its next owner.
_ATTEMPTS, _PAUSE = 20, 0.02
# Outputs locked by whoever runs here; other threads begin with none.
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of an output while the block runs; one that is held here may be taken again.

    Folders that the lock's file needs are created, and removed again where they stay empty.

    Raises:
        RecipeError: another run holds it, or its file cannot be written.
    """
    target = target.resolve()
    if target in _held.get():
        yield
        return
    file = target.with_name(f".{target.name}.lock")
    try:
        missing = [folder for folder in file.parents if not folder.exists()]
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(file, target)
    except OSError as error:
        raise RecipeError(f"output {target}: cannot be written ({error.strerror})") from error
    token = _held.set(_held.get() | {target})
    try:
        yield
    finally:
        _held.reset(token)
        _release(descriptor, file)
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def _acquire(file: Path, target: Path) -> int:
    """Return a descriptor of the lock's file, locked, once the file says so."""
    for _ in range(_ATTEMPTS):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            holder = _holder(descriptor)
            is_free = _try_lock(descriptor, holder)
            if is_free and not _is_still_there(descriptor, file):
                os.close(descriptor)
                continue
            if not is_free and holder is None:
                os.close(descriptor)
                time.sleep(_PAUSE)
                continue
            if holder and (not is_free or _is_elsewhere(holder)):
                raise RecipeError(_in_use(target, file, holder, is_free=is_free))
            if holder:
                log.info(
                    "%s: an earlier run (process %s) ended without finishing",
                    target,
                    holder["process"],
                )
            _write_holder(descriptor)
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise
        return descriptor
    raise RecipeError(f"{target}: another run is using it; wait for it, or choose another output")


def _in_use(target: Path, file: Path, holder: Mapping[str, Any], *, is_free: bool) -> str:
    """Return a sentence that says who uses an output, and what to do."""
    who = f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    advice = "wait for it, or choose another output"
    if is_free:
        advice += f"; if it is no longer running, delete {file}"
    return f"{target}: another run is using it ({who}); {advice}"


def _release(descriptor: int, file: Path) -> None:
    # An open file can be deleted on all systems but Windows, where it must be closed first.
    if sys.platform == "win32":
        os.close(descriptor)
    with suppress(OSError):
        file.unlink()
    if sys.platform != "win32":
        os.close(descriptor)


def _try_lock(descriptor: int, holder: Mapping[str, Any] | None) -> bool:
    """Lock an open file until it is closed; False where another process or thread has locked it.

    Where the file system has no locks, ``holder``'s process decides.
    """
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return holder is None or not _is_running(holder)
    return True


def _is_elsewhere(holder: Mapping[str, Any]) -> bool:
    """Tell whether a lock was taken on another machine; a host may have started anew since."""
    return bool(holder["machine"] != _machine() and holder["host"] != socket.gethostname())


def _is_running(holder: Mapping[str, Any]) -> bool:
    """Tell whether the process that took a lock runs on this machine."""
    try:
        os.kill(int(holder["process"]), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return not _is_elsewhere(holder) and holder["machine"] == _machine()


def _is_still_there(descriptor: int, file: Path) -> bool:
    """Tell whether an open file still has its name: its last owner may just have deleted it."""
    try:
        return bool(os.path.samestat(os.fstat(descriptor), file.stat()))
    except OSError:
        return False


def _holder(descriptor: int) -> dict[str, Any] | None:
    """Return who holds a lock; None where its file does not say."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        holder = json.loads(os.read(descriptor, 4096))
    except ValueError:
        return None
    keys = {"process", "host", "machine", "since"}
    return holder if isinstance(holder, dict) and keys <= holder.keys() else None


def _write_holder(descriptor: int) -> None:
    holder = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "machine": _machine(),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, f"{json.dumps(holder)}\n".encode())


def _machine() -> str:
    """Identify the running kernel, which containers share; elsewhere the host by its name."""
    try:
        return _BOOT_ID.read_text(encoding="utf-8").strip()
    except OSError:
        return socket.gethostname()
