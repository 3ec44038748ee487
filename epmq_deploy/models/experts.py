"""Opening base and experts, checking that they are unchanged, and running experts in torch."""

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from epmq_deploy.artifacts.manifest import AnyManifest
from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.files import usable_settings
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.checkpoints.weight_scan import READERS, scan
from epmq_deploy.errors import EpmqError, MismatchError, RecipeError
from epmq_deploy.hashing import file_sha256, files_sha256
from epmq_deploy.models import ModelFamily, family_of
from epmq_deploy.recipe import Recipe

# Stands among task names, which cannot contain spaces.
BASE = "the base"


@dataclass(frozen=True)
class Sources:
    """The models a recipe names, each folder opened once; tensor names are the base's.

    Attributes:
        family: of base and experts.
        base: the base model.
        experts: task name to expert.
    """

    family: ModelFamily
    base: Checkpoint
    experts: Mapping[str, Checkpoint]

    def sha256(self) -> dict[str, str]:
        """Hash weights and settings by role: ``base``, ``expert:<task>``."""
        folders = {"base": self.base.source}
        folders |= {f"expert:{name}": expert.source for name, expert in self.experts.items()}
        with ThreadPoolExecutor(READERS) as threads:
            return dict(zip(folders, threads.map(_folder_sha256, folders.values()), strict=True))


def _folder_sha256(folder: ModelFolder) -> str:
    return files_sha256(folder.path, [*folder.weight_files, *folder.setting_files], _file_sha256)


def _file_sha256(file: Path) -> str:
    # Where the values of weights were checked, their files have been read and hashed already.
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
    """Open whatever can be opened of base and experts; no tensor is read yet.

    Returns:
        The base with the experts that could be opened, None where the base or all experts could
        not; and one sentence for every model that cannot be opened.

    Raises:
        RecipeError: the base's model type is not supported, and nothing else is wrong.
    """
    folders, problems = _folders(recipe)
    base_folder = folders.pop(BASE, None)
    if base_folder is None:
        return None, problems
    try:
        family = family_of(base_folder.path, folders.values()).merging(recipe.base.part)
    except RecipeError as error:
        if not problems:
            raise
        return None, [*problems, f"{BASE}: {error}"]
    try:
        base = Checkpoint.open(base_folder, family.canonical_key, family.tied, family.is_known)
    except EpmqError as error:
        return None, [*problems, f"{BASE}: {error}"]
    experts = {}
    for name, folder in folders.items():
        try:
            with usable_settings(folder.path):
                rename = family.expert_rename(folder.config or {})
            experts[name] = Checkpoint.open_expert(
                folder, base, rename, family.tied, family.is_head
            )
        except EpmqError as error:
            problems.append(f"expert {name!r}: {error}")
    return (Sources(family, base, experts) if experts else None), problems


def _folders(recipe: Recipe) -> tuple[dict[str, ModelFolder], list[str]]:
    """Open the folders of base and experts, by task; also return why others cannot be used."""
    folders, problems = {}, []
    paths: dict[str, tuple[str, str | None]] = {BASE: (recipe.base.path, None)}
    paths |= {name: (task.expert, task.adapter) for name, task in recipe.tasks.items()}
    for name, (path, adapter) in paths.items():
        try:
            folder = ModelFolder.open(path, adapter)
            if name == BASE:
                folder.check_base()
            else:
                folder.check_expert()
            folders[name] = folder
        except EpmqError as error:
            problems.append(f"{name if name == BASE else f'expert {name!r}'}: {error}")
    return folders, problems


def check_unchanged(sources: Sources, manifest: AnyManifest) -> None:
    """Make sure that base and experts are those a stage's output was computed from.

    Raises:
        MismatchError: names every model that was changed or was not among them.
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
    """One backbone in memory that takes each expert's weights in turn.

    Tensors that an expert does not hold (a projection, for example) or that are not merged are the
    base's.

    Attributes:
        sources: base and experts.
        device: that the backbone is on.
    """

    def __init__(self, sources: Sources, device: torch.device) -> None:
        self.sources = sources
        self.device = device
        self._model = sources.family.load(sources.base.folder).to(device)

    @property
    def tasks(self) -> Collection[str]:
        """Task names of the experts."""
        return tuple(self.sources.experts)

    def embedding_width(self) -> int:
        """Return the width of the embedding that heads take; all experts have the same."""
        return self.sources.family.embedding_width(self._model, self.sources.base.folder)

    def base_tensor(self, name: str) -> Tensor:
        """Read one of the base's tensors, float32, on the device."""
        return self.sources.base.load(name).to(self.device, torch.float32)

    def tensor(self, task: str, name: str) -> Tensor:
        """Read one of an expert's tensors, float32, on the device."""
        return self._source(task, name).load(name).to(self.device, torch.float32)

    def become(self, task: str, *, without: Collection[str] = ()) -> nn.Module:
        """Return the backbone with an expert's weights, valid until the next call.

        Args:
            task: the expert's task.
            without: dotted names of modules whose weights are not needed and stay as they are.
        """
        skipped = tuple(f"{name}." for name in without)
        return self._take(task, "", skipped)

    def module(self, task: str, name: str) -> nn.Module:
        """Return one module of the backbone with an expert's weights, valid until the next call."""
        return self._take(task, f"{name}.", ()).get_submodule(name)

    def _take(self, task: str, prefix: str, skipped: tuple[str, ...]) -> nn.Module:
        for name, parameter in self._model.named_parameters():
            if name.startswith(prefix) and not name.startswith(skipped):
                self._source(task, name).load_into(name, parameter.data)
        return self._model

    def _source(self, task: str, name: str) -> Checkpoint:
        expert = self.sources.experts[task]
        held = name in expert.tensors and self.sources.family.is_merged(name)
        return expert if held else self.sources.base
