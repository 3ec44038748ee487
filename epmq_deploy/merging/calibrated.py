"""What merge methods that need data are given, and what they find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from epmq_deploy.calibration.block_runner import ModuleSource
    from epmq_deploy.models import ModelFamily
    from epmq_deploy.models.predictions import Predictions
    from epmq_deploy.progress import Progress


class CalibrationData(Protocol):
    """Calibration samples of every task, and the models to run them through."""

    @property
    def family(self) -> ModelFamily:
        """Of base and experts."""
        ...

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the experts."""
        ...

    @property
    def experts(self) -> ModuleSource:
        """The experts, on the device; each is valid until the next is asked for."""
        ...

    @property
    def progress(self) -> Progress:
        """Shows how far a long pass got."""
        ...

    def batches(self, task: str, size: int) -> Iterator[tuple[Tensor, ...]]:
        """A task's model inputs, at most ``size`` samples at a time, on the device."""
        ...

    def predictions(self, task: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> Predictions:
        """What a model predicts for a batch of a task; only for methods that ask for heads."""
        ...

    def backbone(self) -> nn.Module:
        """A model of its own with the base's weights, float32, on the device."""
        ...


@dataclass(frozen=True)
class Calibrated:
    """What a pass over calibration data found.

    Attributes:
        statistics: handed to every ``merge`` call.
        details: plain data for the manifest.
    """

    statistics: Any
    details: Mapping[str, Any] = field(default_factory=dict)
