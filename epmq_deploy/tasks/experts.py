"""Experts in torch: one backbone in memory that takes on each expert's weights in turn."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from epmq_deploy.merging.merge import open_experts
from epmq_deploy.models import ModelFamily, family_of
from epmq_deploy.recipe import Recipe


class ExpertBackbone:
    """Reads base and experts tensor by tensor; memory does not grow with their number.

    Tensors that experts do not hold (a projection, say) are the base's.

    Args:
        recipe: names base and experts.
        device: where to run.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._opened = open_experts(recipe)
        self.family: ModelFamily = family_of(self._opened.base.folder)
        self.device = device
        self._model = self.family.load(self._opened.base.folder).to(device)

    def base_tensor(self, name: str) -> Tensor:
        """One of the base's tensors, float32, on the device."""
        return self._opened.base.load(name).to(self.device, torch.float32)

    def tensor(self, task: str, name: str) -> Tensor:
        """One of an expert's tensors, float32, on the device."""
        expert = self._opened.experts[task]
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
        expert = self._opened.experts[task]
        for name, parameter in self._model.named_parameters():
            wanted = name.startswith(prefix) and not name.startswith(skipped)
            if wanted and name in expert.tensors:
                parameter.data.copy_(expert.load(name))
        return self._model
