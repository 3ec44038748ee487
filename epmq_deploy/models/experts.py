"""Base and experts: opened, checked to be unchanged, and run in torch."""

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from epmq_deploy.artifacts.manifest import AnyManifest
from epmq_deploy.checkpoints.checkpoint import (
    Checkpoint,
    expert_files,
    fetch_model,
    model_config,
    setting_files,
    weight_files,
)
from epmq_deploy.checkpoints.weight_scan import READERS, scan
from epmq_deploy.errors import EpmqError, MismatchError, RecipeError
from epmq_deploy.hashing import file_sha256, files_sha256
from epmq_deploy.models import ModelFamily, family_of
from epmq_deploy.recipe import Recipe

# No task's name: those have no space.
_BASE = "the base"


@dataclass(frozen=True)
class Sources:
    """The models a recipe names, opened; tensor names are the base's.

    Attributes:
        family: of all of them.
        base: the base model.
        experts: task name to expert.
    """

    family: ModelFamily
    base: Checkpoint
    experts: Mapping[str, Checkpoint]

    def sha256(self) -> dict[str, str]:
        """Hashes of weights and settings by role: ``base``, ``expert:<task>``."""
        folders = {"base": self.base.folder}
        folders |= {f"expert:{name}": expert.folder for name, expert in self.experts.items()}
        with ThreadPoolExecutor(READERS) as threads:
            return dict(zip(folders, threads.map(_folder_sha256, folders.values()), strict=True))


def _folder_sha256(folder: Path) -> str:
    return files_sha256(folder, [*expert_files(folder), *setting_files(folder)], _sha256)


def _sha256(file: Path) -> str:
    # Checking the values of weights has read them already.
    return scan(file).sha256 if file.suffix == ".safetensors" else file_sha256(file)


def open_sources(recipe: Recipe) -> Sources:
    """Open base and experts; no tensor is read yet.

    Raises:
        MismatchError: names every model that cannot be opened.
        RecipeError: the base's model type is not supported.
    """
    sources, problems = open_available(recipe)
    if sources is None or problems:
        raise MismatchError("models cannot be opened", problems)
    return sources


def open_available(recipe: Recipe) -> tuple[Sources | None, list[str]]:
    """Open base and experts as far as they can be; no tensor is read yet.

    Returns:
        The base with those experts that could be opened, None where there is nothing to compare;
        and one sentence for every model that cannot be opened.

    Raises:
        RecipeError: the base's model type is not supported, and nothing else is wrong.
    """
    folders, problems = _folders(recipe)
    where = folders.pop(_BASE, None)
    if where is None:
        return None, problems
    try:
        family = family_of(where).merging(recipe.base.part)
    except RecipeError as error:
        if not problems:
            raise
        return None, [*problems, f"{_BASE}: {error}"]
    try:
        base = Checkpoint.open(where, family.canonical_key, family.tied)
    except EpmqError as error:
        return None, [*problems, f"{_BASE}: {error}"]
    experts = {}
    for name, folder in folders.items():
        try:
            rename = family.expert_rename(model_config(folder) or {})
            experts[name] = Checkpoint.open_expert(folder, base, rename, family.tied)
        except EpmqError as error:
            problems.append(f"expert {name!r}: {error}")
    return (Sources(family, base, experts) if experts else None), problems


def _folders(recipe: Recipe) -> tuple[dict[str, Path], list[str]]:
    """Where base and experts are, by task, and every one of them that cannot be used."""
    folders, problems = {}, []
    paths = {_BASE: recipe.base.path}
    paths |= {name: task.expert for name, task in recipe.tasks.items()}
    for name, path in paths.items():
        try:
            folder = fetch_model(path)
            files = weight_files if name == _BASE else expert_files
            files(folder)
            folders[name] = folder
        except EpmqError as error:
            problems.append(f"{name if name == _BASE else f'expert {name!r}'}: {error}")
    return folders, problems


def check_unchanged(sources: Sources, manifest: AnyManifest) -> None:
    """Make sure base and experts are those a stage's output was made from.

    Raises:
        MismatchError: names every model that was changed or was no part of it.
    """
    problems = []
    for role, digest in sources.sha256().items():
        kind, _, task = role.partition(":")
        label = f"{kind} {task!r}" if task else kind
        if role not in manifest.inputs:
            problems.append(f"{label} is not part of the merged model")
        elif manifest.inputs[role] != digest:
            problems.append(f"{label} was changed since it was merged; merge again")
    if problems:
        raise MismatchError("base and experts are not those that were merged", problems)


class ExpertBackbone:
    """One backbone in memory that takes on each expert's weights in turn.

    Tensors that an expert does not hold (a projection, say) or that are not merged are the base's.

    Args:
        sources: base and experts.
        device: where to run.
    """

    def __init__(self, sources: Sources, device: torch.device) -> None:
        self._sources = sources
        self.device = device
        self._model = sources.family.load(sources.base.folder).to(device)

    @property
    def tasks(self) -> Collection[str]:
        """Names of the experts."""
        return tuple(self._sources.experts)

    def embedding_width(self) -> int:
        """Width of the embedding that heads take, whichever weights are held."""
        return self._sources.family.embedding_width(self._model, self._sources.base.folder)

    def base_tensor(self, name: str) -> Tensor:
        """One of the base's tensors, float32, on the device."""
        return self._sources.base.load(name).to(self.device, torch.float32)

    def tensor(self, task: str, name: str) -> Tensor:
        """One of an expert's tensors, float32, on the device."""
        return self._source(task, name).load(name).to(self.device, torch.float32)

    def become(self, task: str, *, without: Collection[str] = ()) -> nn.Module:
        """The backbone with an expert's weights, until the next call.

        Args:
            task: the expert's task.
            without: modules by dotted name whose weights are not needed and stay as they are.
        """
        skipped = tuple(f"{name}." for name in without)
        return self._take(task, "", skipped)

    def module(self, task: str, name: str) -> nn.Module:
        """One module of the backbone with an expert's weights, until the next call."""
        return self._take(task, f"{name}.", ()).get_submodule(name)

    def _take(self, task: str, prefix: str, skipped: tuple[str, ...]) -> nn.Module:
        for name, parameter in self._model.named_parameters():
            if name.startswith(prefix) and not name.startswith(skipped):
                self._source(task, name).load_into(name, parameter.data)
        return self._model

    def _source(self, task: str, name: str) -> Checkpoint:
        expert = self._sources.experts[task]
        held = name in expert.tensors and self._sources.family.is_merged(name)
        return expert if held else self._sources.base
