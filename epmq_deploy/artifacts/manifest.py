"""Output folders of the stages: written atomically, each with a manifest of what made it."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from epmq_deploy.artifacts.card import write_card
from epmq_deploy.artifacts.names import CARD, MANIFEST
from epmq_deploy.errors import RecipeError
from epmq_deploy.hashing import file_sha256
from epmq_deploy.recipe import Recipe, parse_complete
from epmq_deploy.version import __version__

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


def _versions() -> dict[str, str]:
    found = {"epmq-deploy": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
