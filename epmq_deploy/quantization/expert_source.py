"""Where quantization methods get the weights they aim at, a piece at a time."""

from collections.abc import Collection
from typing import Protocol

from torch import Tensor

from epmq_deploy.calibration.block_runner import ModuleSource, SameForAllTasks


class ExpertWeights(Protocol):
    """Tensors of base and experts by name."""

    @property
    def tasks(self) -> Collection[str]:
        """Names of the experts."""
        ...

    def base_tensor(self, name: str) -> Tensor:
        """Return one of the base's tensors, float32, on the model's device."""
        ...

    def tensor(self, task: str, name: str) -> Tensor:
        """Return one of an expert's tensors, float32, on the model's device."""
        ...


class ExpertSource(ExpertWeights, ModuleSource, Protocol):
    """Tensors of base and experts, and the experts themselves."""


class MergedAsExpert(SameForAllTasks):
    """The unquantized merged model in the place of every expert."""

    tasks: Collection[str] = ()

    def base_tensor(self, name: str) -> Tensor:
        """Return one of the merged model's tensors."""
        return self._model.get_parameter(name)

    def tensor(self, task: str, name: str) -> Tensor:
        """Return one of the merged model's tensors."""
        return self._model.get_parameter(name)
