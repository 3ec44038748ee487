"""Output folders of the stages: written atomically, each with a manifest of what made it."""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from epmq_deploy import __version__
from epmq_deploy.card import CARD, write_card
from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import Recipe, parse_complete

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_PACKAGES = ("torch", "transformers", "safetensors", "onnx", "onnxruntime-gpu", "onnxruntime")


@dataclass(frozen=True)
class Manifest:
    """What made a stage's folder.

    Attributes:
        stage: ``merge``, ``quantize`` or ``export``.
        fingerprint: sha256 over stage, options and inputs; equal fingerprints mean equal outputs.
        recipe: the whole recipe, paths absolute, flags applied.
        inputs: sha256 by role, e.g. ``base``, ``expert:mnist``, ``merge``.
        outputs: sha256 by file name, of every file beside the manifest and the model card.
        details: what the stage reports about its result.
        versions: of this package, Python and the libraries that shape the result.
        format_version: of this folder layout.
    """

    stage: str
    fingerprint: str
    recipe: Recipe
    inputs: Mapping[str, str]
    outputs: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def fingerprint(stage: str, options: Any, inputs: Mapping[str, str]) -> str:
    """sha256 over what decides a stage's result; ``options`` must be plain data."""
    content = [FORMAT_VERSION, __version__, stage, options, dict(sorted(inputs.items()))]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
        digest.update(f"{name} {of_file(folder / name)}\n".encode())
    return digest.hexdigest()


def read_manifest(folder: Path, stage: str) -> Manifest:
    """The manifest of a stage's folder.

    Raises:
        RecipeError: no manifest, another stage's, or one this version cannot read.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise RecipeError(f"{folder}: no {MANIFEST}; expected the output of `epmq {stage}`")
    try:
        content = json.loads(file.read_text())
        found, layout = content["stage"], content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{file}: not a manifest of epmq-deploy") from error
    if layout != FORMAT_VERSION:
        raise RecipeError(f"{file}: layout {layout}, this version reads {FORMAT_VERSION}")
    if found != stage:
        raise RecipeError(
            f"{folder} is the output of `epmq {found}`, expected that of `epmq {stage}`"
        )
    content["recipe"] = parse_complete(content["recipe"], str(file))
    return Manifest(**content)


def check_outputs(folder: Path, manifest: Manifest) -> None:
    """Make sure a stage's files are those its manifest lists.

    Raises:
        RecipeError: names every missing or changed file.
    """
    wrong = []
    for name, digest in manifest.outputs.items():
        if not (folder / name).is_file():
            wrong.append(f"{name} is missing")
        elif file_sha256(folder / name) != digest:
            wrong.append(f"{name} was changed")
    if wrong:
        raise RecipeError(
            f"{folder}: {', '.join(wrong)} since {MANIFEST} was written; "
            f"run `epmq {manifest.stage}` again"
        )


def open_output(folder: Path, stage: str) -> Manifest:
    """The manifest of a stage's folder whose files are all as it lists them.

    Raises:
        RecipeError: see ``read_manifest`` and ``check_outputs``.
    """
    manifest = read_manifest(folder, stage)
    check_outputs(folder, manifest)
    return manifest


def model_inputs(manifest: Manifest) -> dict[str, str]:
    """Hashes of base and experts, which every stage hands on to the next."""
    return {
        role: digest
        for role, digest in manifest.inputs.items()
        if role == "base" or role.startswith("expert:")
    }


def is_done(folder: Path, stage: str, expected: str) -> bool:
    """Whether ``folder`` already holds this stage's output for this fingerprint, intact."""
    try:
        return open_output(folder, stage).fingerprint == expected
    except RecipeError:
        return False


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Complete a manifest with output hashes and versions; write it and a card into ``folder``."""
    outputs = {
        file.relative_to(folder).as_posix(): file_sha256(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST and file != folder / CARD
    }
    content = {**vars(manifest), "outputs": outputs, "versions": _versions()}
    complete = Manifest(**content)
    plain = asdict(complete) | {"recipe": manifest.recipe.model_dump(mode="json")}
    (folder / MANIFEST).write_text(json.dumps(plain, indent=2) + "\n")
    write_card(folder, complete)
    return complete


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
    place = target.resolve()
    if source is not None:
        given = source.resolve()
        if place == given or given in place.parents or place in given.parents:
            raise RecipeError(f"output {target} and input {source} must not contain each other")
    parent = next(folder for folder in place.parents if folder.exists())
    if not parent.is_dir():
        raise RecipeError(f"output {target}: {parent} is no folder")
    if not os.access(parent, os.W_OK):
        raise RecipeError(f"output {target}: no permission to write into {parent}")
    if not place.exists():
        return
    if not place.is_dir():
        raise RecipeError(f"output {target} exists and is no folder; choose another")
    if not any(place.iterdir()):
        return
    if not overwrite:
        raise RecipeError(f"{target} already exists; choose another output or pass --overwrite")
    if _stage_of(place) != stage:
        # Never delete what this command did not write.
        raise RecipeError(
            f"{target} is not the output of `epmq {stage}`, so it is not replaced; choose another "
            "output"
        )


def _stage_of(folder: Path) -> str | None:
    """The stage whose output a folder is, whatever version wrote it."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(content, dict) and "fingerprint" in content
    return str(content.get("stage")) if ours else None


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes it when the block ends well.

    On any error nothing is left behind and an existing ``target`` stays as it was; whether it may
    be replaced is for ``refuse_existing`` to say, before any work.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    replaced = temporary.with_name(f"{temporary.name}-replaced")
    try:
        # mkdtemp is private to the user; outputs follow the umask like any other folder.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
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
    temporary.write_text(text)
    temporary.replace(target)


def _versions() -> dict[str, str]:
    found = {"epmq-deploy": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
