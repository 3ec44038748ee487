"""Finished outputs of stages: completed with hashes, versions and a model card; opened again."""

import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Generic, Literal, TypeVar, overload

from epmq_deploy.artifacts.card import write_card
from epmq_deploy.artifacts.manifest import (
    AnyManifest,
    ExportManifest,
    MergeManifest,
    QuantizeManifest,
    Stage,
    read_manifest,
)
from epmq_deploy.artifacts.names import CARD, MANIFEST
from epmq_deploy.errors import RecipeError
from epmq_deploy.hashing import file_sha256
from epmq_deploy.version import __version__

_PACKAGES = ("torch", "transformers", "safetensors", "onnx", "onnxruntime-gpu", "onnxruntime")


M = TypeVar("M", MergeManifest, QuantizeManifest, ExportManifest)


@dataclass(frozen=True)
class StageOutput(Generic[M]):
    """What a stage wrote; stands for its folder wherever a path is expected.

    Attributes:
        folder: that was written.
        manifest: of the folder.
    """

    folder: Path
    manifest: M

    def __fspath__(self) -> str:
        return str(self.folder)


def finish_output(folder: Path, manifest: M) -> M:
    """Complete a manifest with hashes and versions; write it and a model card into ``folder``."""
    outputs = {
        file.relative_to(folder).as_posix(): file_sha256(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST and file != folder / CARD
    }
    complete = manifest.model_copy(update={"outputs": outputs, "versions": _versions()})
    (folder / MANIFEST).write_text(json.dumps(complete.to_json(), indent=2) + "\n")
    write_card(folder, complete)
    return complete


@overload
def open_output(folder: Path, stage: Literal["merge"]) -> MergeManifest: ...
@overload
def open_output(folder: Path, stage: Literal["quantize"]) -> QuantizeManifest: ...
@overload
def open_output(folder: Path, stage: Literal["export"]) -> ExportManifest: ...
@overload
def open_output(folder: Path, stage: Stage) -> AnyManifest: ...
def open_output(folder: Path, stage: Stage) -> AnyManifest:
    """Read the manifest of a stage's folder whose files are all as it lists them.

    Raises:
        RecipeError: see ``read_manifest`` and ``check_outputs``.
    """
    manifest = read_manifest(folder, stage)
    check_outputs(folder, manifest)
    return manifest


def check_outputs(folder: Path, manifest: AnyManifest) -> None:
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


def is_done(folder: Path, stage: Stage, fingerprint: str) -> bool:
    """Whether ``folder`` already holds this stage's output for this fingerprint, intact."""
    try:
        return open_output(folder, stage).fingerprint == fingerprint
    except RecipeError:
        return False


def _versions() -> dict[str, str]:
    versions = {"epmq-deploy": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
