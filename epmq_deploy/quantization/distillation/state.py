"""Where a training stands after an epoch, and how that is kept for a run that goes on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from pydantic import TypeAdapter
from torch import Tensor, nn

from epmq_deploy.artifacts.manifest import TrainedEpoch
from epmq_deploy.quantization.distillation.optimizers import Optimizers

_MOMENTS = "moments/"


class TensorStore(Protocol):
    """Keeps tensors of an interrupted run by name."""

    def load_tensors(self, name: str) -> tuple[dict[str, Tensor], str] | None:
        """Return the tensors and the text saved under a name, or None."""
        ...

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], text: str) -> None:
        """Save tensors and a text in the place of what was there: all of it or nothing."""
        ...


@dataclass(frozen=True)
class Standing:
    """Where a training stands.

    Attributes:
        rate: highest learning rate of the present attempt.
        began: epochs that were over when it began.
        steps: optimizer steps since.
        curve: one entry per epoch, over all attempts.
        chosen: epoch with the least divergence, from 1; 0 for the start.
        lowest: its divergence.
    """

    rate: float
    lowest: float
    began: int = 0
    steps: int = 0
    curve: tuple[TrainedEpoch, ...] = ()
    chosen: int = 0


def named_tensors(
    parameters: Mapping[str, nn.Parameter],
    best: Mapping[str, Tensor],
    optimizers: Optimizers,
) -> dict[str, Tensor]:
    """Return copies on the CPU of weights, best weights and the optimizers' moments, by name."""
    tensors = {f"weights/{name}": value.detach() for name, value in parameters.items()}
    tensors |= {f"best/{name}": value for name, value in best.items()}
    for name, parameter in parameters.items():
        for moment, value in optimizers.moments(parameter).items():
            tensors[f"{_MOMENTS}{moment}/{name}"] = value
    return copied(tensors)


def restore(
    tensors: Mapping[str, Tensor],
    steps: int,
    parameters: Mapping[str, nn.Parameter],
    optimizers: Optimizers,
) -> dict[str, Tensor]:
    """Give parameters and optimizers what ``named_tensors`` returned; return the best weights."""
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(_MOMENTS):
            moment, _, name = key.removeprefix(_MOMENTS).partition("/")
            moments.setdefault(name, {})[moment] = value
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"weights/{name}"])
        if name in moments:
            optimizers.restore(parameter, moments[name], steps)
    return {
        name.removeprefix("best/"): value
        for name, value in tensors.items()
        if name.startswith("best/")
    }


def copied(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return copies on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in dict(tensors).items()}


STANDING = TypeAdapter(Standing)
