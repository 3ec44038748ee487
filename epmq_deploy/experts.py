"""Base and experts: opened, checked to be unchanged, and run in torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epmq_deploy.checkpoints import Checkpoint, fetch_model, setting_files, weight_files
from epmq_deploy.errors import EpmqError, MismatchError
from epmq_deploy.models import ModelFamily, family_of
from epmq_deploy.recipe import Recipe
from epmq_deploy.stage import Manifest, files_sha256


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
        roles = {"base": self.base}
        roles |= {f"expert:{name}": expert for name, expert in self.experts.items()}
        return {
            role: files_sha256(
                found.folder, [*weight_files(found.folder), *setting_files(found.folder)]
            )
            for role, found in roles.items()
        }


def open_sources(recipe: Recipe) -> Sources:
    """Open base and experts; no tensor is read yet.

    Raises:
        MismatchError: names every model that cannot be opened.
        RecipeError: the base's model type is not supported.
    """
    problems = []
    folders = {}
    paths = {"base": recipe.base.path}
    paths |= {f"expert {name!r}": task.expert for name, task in recipe.tasks.items()}
    for role, path in paths.items():
        try:
            folders[role] = fetch_model(path)
            weight_files(folders[role])
        except EpmqError as error:
            problems.append(f"{role}: {error}")
    if problems:
        raise MismatchError("models cannot be opened", problems)
    family = family_of(folders["base"])
    opened = {}
    for role, folder in folders.items():
        try:
            opened[role] = Checkpoint.open(folder, family.canonical_key)
        except EpmqError as error:
            problems.append(f"{role}: {error}")
    if problems:
        raise MismatchError("models cannot be opened", problems)
    experts = {name: opened[f"expert {name!r}"] for name in recipe.tasks}
    return Sources(family, opened["base"], experts)


def check_unchanged(sources: Sources, manifest: Manifest) -> None:
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

    Tensors that an expert does not hold (a projection, say) are the base's.

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

    def base_tensor(self, name: str) -> Tensor:
        """One of the base's tensors, float32, on the device."""
        return self._sources.base.load(name).to(self.device, torch.float32)

    def tensor(self, task: str, name: str) -> Tensor:
        """One of an expert's tensors, float32, on the device."""
        expert = self._sources.experts[task]
        if name not in expert.tensors:
            return self.base_tensor(name)
        return expert.load(name).to(self.device, torch.float32)

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
                expert = self._sources.experts[task]
                source = expert if name in expert.tensors else self._sources.base
                source.load_into(name, parameter.data)
        return self._model
