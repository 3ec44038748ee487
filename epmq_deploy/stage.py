"""Output folders of the stages: written atomically, each with a manifest of what made it."""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from epmq_deploy import __version__
from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import Recipe, parse_recipe

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_PACKAGES = ("torch", "transformers", "safetensors", "onnx", "onnxruntime-gpu", "onnxruntime")


@dataclass(frozen=True)
class Manifest:
    """What made a stage's folder.

    Attributes:
        stage: ``merge``, ``quantize``, ``export`` or ``eval``.
        fingerprint: sha256 over stage, options and inputs; equal fingerprints mean equal outputs.
        recipe: the whole recipe, paths absolute, flags applied.
        inputs: sha256 by role, e.g. ``base``, ``expert:mnist``, ``merge``.
        outputs: sha256 by file name, of every file beside the manifest.
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


def files_sha256(files: Iterable[Path]) -> str:
    """One sha256 over names and contents of several files, in name order."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda path: path.name):
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
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
    content["recipe"] = parse_recipe(content["recipe"], str(file))
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


def is_done(folder: Path, stage: str, expected: str) -> bool:
    """Whether ``folder`` already holds this stage's output for this fingerprint, intact."""
    try:
        manifest = read_manifest(folder, stage)
        check_outputs(folder, manifest)
    except RecipeError:
        return False
    return manifest.fingerprint == expected


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Complete a manifest with output hashes and versions, and write it into ``folder``."""
    outputs = {
        file.relative_to(folder).as_posix(): file_sha256(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    content = {**vars(manifest), "outputs": outputs, "versions": _versions()}
    complete = Manifest(**content)
    plain = asdict(complete) | {"recipe": manifest.recipe.model_dump(mode="json")}
    (folder / MANIFEST).write_text(json.dumps(plain, indent=2) + "\n")
    return complete


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Stop before any work when the output is in the way.

    Raises:
        RecipeError: ``target`` exists and may not be replaced, or is no stage's folder.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise RecipeError(f"{target} already exists; choose another output or pass --overwrite")
    if target.is_dir() and not (target / MANIFEST).is_file():
        # Never delete a folder this tool did not write.
        raise RecipeError(f"{target} exists and holds no {MANIFEST}; it is not replaced")


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes it when the block ends well.

    On any error nothing is left behind and an existing ``target`` stays as it was.

    Raises:
        RecipeError: see ``refuse_existing``.
    """
    refuse_existing(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        # mkdtemp is private to the user; outputs follow the umask like any other folder.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        yield temporary
        if target.exists():
            replaced = temporary.with_name(f"{temporary.name}-replaced")
            target.rename(replaced)
            temporary.rename(target)
            shutil.rmtree(replaced)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
