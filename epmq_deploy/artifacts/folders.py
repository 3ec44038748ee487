"""Output folders: refused if they must not be replaced, else written atomically."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from epmq_deploy.artifacts.locks import locked
from epmq_deploy.artifacts.names import MANIFEST
from epmq_deploy.artifacts.space import explaining_full_disk
from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe.paths import check_encoding

log = logging.getLogger(__name__)

# Endings of the temporary folders next to an output: what is written, and what it replaces.
_PARTIAL, _REPLACED = ".partial", ".replaced"


def refuse_existing(
    target: Path, stage: str, *, overwrite: bool, source: Path | None = None
) -> None:
    """Stop before any work when the output is in the way.

    Args:
        target: folder to be written.
        stage: the only stage whose output may be replaced.
        overwrite: whether it may be replaced at all.
        source: the stage's input folder.

    Raises:
        RecipeError: ``target`` exists and may not be replaced, cannot be a folder, or lies within
            ``source`` or around it.
    """
    check_encoding(target)
    place = target.resolve()
    if source is not None:
        given = source.resolve()
        if place == given or given in place.parents or place in given.parents:
            raise RecipeError(f"output {target} and input {source} must not contain each other")
    parent = next(folder for folder in place.parents if folder.exists())
    if not parent.is_dir():
        raise RecipeError(f"output {target}: {parent} is not a directory")
    if not os.access(parent, os.W_OK):
        raise RecipeError(f"output {target}: no permission to write into {parent}")
    if not place.exists():
        return
    if not place.is_dir():
        raise RecipeError(f"output {target} exists and is not a directory; choose another")
    if not any(place.iterdir()):
        return
    if not overwrite:
        raise RecipeError(
            f"{target} already exists; choose another output or overwrite it",
            options={"overwrite": True},
        )
    if _stage_of(place) != stage:
        # Never delete what this command did not write.
        raise RecipeError(
            f"{target} is not the output of `epmq {stage}`, so it is not replaced; choose another "
            "output"
        )


@contextmanager
def reserved(
    target: Path, stage: str, *, overwrite: bool, source: Path | None = None
) -> Iterator[None]:
    """Keep an output for the block alone, after deleting what killed runs left of it.

    Args:
        target: folder to be written.
        stage: the only stage whose output may be replaced.
        overwrite: whether it may be replaced at all.
        source: the stage's input folder.

    Raises:
        RecipeError: see ``refuse_existing``, or another run is using it.
        DiskSpaceError: the block ran out of disk space.
    """
    refuse_existing(target, stage, overwrite=overwrite, source=source)
    with locked(target):
        remove_leftovers(target)
        # Another run may have written it since.
        refuse_existing(target, stage, overwrite=overwrite, source=source)
        with explaining_full_disk(target):
            yield


def remove_leftovers(target: Path) -> None:
    """Delete temporary folders of runs that were killed; call with the target's lock held.

    A folder that was about to be replaced gets its name back.
    """
    target = target.resolve()
    if not target.parent.is_dir():
        return
    name = re.compile(rf"\.{re.escape(target.name)}-[a-z0-9_]{{8}}({_PARTIAL}|{_REPLACED})")
    for folder in sorted(target.parent.iterdir()):
        match = name.fullmatch(folder.name)
        if match is None or folder.is_symlink() or not folder.is_dir():
            continue
        if match[1] == _REPLACED and not target.exists():
            log.warning(
                "%s: restored from %s, where a killed run had moved it", target, folder.name
            )
            folder.rename(target)
        else:
            log.info("deleting %s, left by a run that was killed", folder)
            shutil.rmtree(folder, ignore_errors=True)


def unfinished_folder(target: Path) -> Path:
    """Return the hidden folder next to an output for what an interrupted run has finished."""
    target = target.resolve()
    return target.with_name(f".{target.name}.unfinished")


def refuse_existing_file(file: Path, *, overwrite: bool) -> None:
    """Stop before any work when a file cannot be written.

    Raises:
        RecipeError: it is a directory, its directory does not exist, or it may not be replaced.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise RecipeError(f"{file}: must be a file in an existing folder")
    if file.exists() and not overwrite:
        raise RecipeError(
            f"{file} already exists; choose another output or overwrite it",
            options={"overwrite": True},
        )


def _stage_of(folder: Path) -> str | None:
    """Return the stage whose output a folder is, whatever version wrote it."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(content, dict) and "fingerprint" in content
    return str(content.get("stage")) if ours else None


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``target`` that becomes it when the block ends well.

    On any error nothing is left behind and an existing ``target`` stays as it was; whether it may
    be replaced is for ``refuse_existing`` to say, before any work.

    Raises:
        DiskSpaceError: the block ran out of disk space.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(
        tempfile.mkdtemp(prefix=f".{target.name}-", suffix=_PARTIAL, dir=target.parent)
    )
    replaced = temporary.with_suffix(_REPLACED)
    try:
        # mkdtemp is private to the user; outputs follow the umask like any other folder.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        with explaining_full_disk(temporary):
            yield temporary
        if target.exists():
            target.rename(replaced)
        try:
            temporary.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def atomic_text(target: Path, text: str) -> None:
    """Write a text file so that it is either the old or the whole new one."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with explaining_full_disk(target):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
