"""Where guided targets get weights and modules from, a piece at a time."""

from collections.abc import Collection
from typing import Protocol

from torch import Tensor, nn


class Experts(Protocol):
    """Where guided targets get base and experts from, a piece at a time."""

    @property
    def tasks(self) -> Collection[str]:
        """Names of the experts."""
        ...

    def base_tensor(self, name: str) -> Tensor:
        """One of the base's tensors, float32, on the model's device."""
        ...

    def tensor(self, task: str, name: str) -> Tensor:
        """One of an expert's tensors, float32, on the model's device."""
        ...

    def become(self, task: str, *, without: Collection[str] = ()) -> nn.Module:
        """A model with an expert's weights, but for the modules ``without``."""
        ...

    def module(self, task: str, name: str) -> nn.Module:
        """One module with an expert's weights."""
        ...


class MergedAsExpert:
    """The unquantized merged model in the place of every expert, for targets that aim at it.

    Args:
        model: the merged model; not modified.
    """

    tasks: Collection[str] = ()

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def base_tensor(self, name: str) -> Tensor:
        """One of the merged model's tensors."""
        return self._model.get_parameter(name)

    def tensor(self, task: str, name: str) -> Tensor:
        """One of the merged model's tensors."""
        return self._model.get_parameter(name)

    def become(self, task: str, *, without: Collection[str] = ()) -> nn.Module:
        """The merged model."""
        return self._model

    def module(self, task: str, name: str) -> nn.Module:
        """One of the merged model's modules."""
        return self._model.get_submodule(name)
