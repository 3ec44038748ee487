"""A model in the place of base and experts."""

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class OneExpert:
    """A model that serves as base and only expert."""

    model: nn.Module
    tasks: Collection[str] = ("all",)

    def base_tensor(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach()

    def tensor(self, task: str, name: str) -> Tensor:
        return self.base_tensor(name)

    def become(self, task: str, *, without: Collection[str] = ()) -> nn.Module:
        return self.model

    def module(self, task: str, name: str) -> nn.Module:
        return self.model.get_submodule(name)
