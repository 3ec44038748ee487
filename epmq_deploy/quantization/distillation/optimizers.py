"""The optimizers of training: Muon for the blocks' matrices, Adam for all else.

With few samples every step counts: steps whose singular values are all alike learn more from each
than Adam's do (Jordan et al., https://kellerjordan.github.io/posts/muon/). Scaled as by Liu et al.
(arXiv 2502.16982), so that a step changes entries of matrices of any shape by as much.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

_BETAS = (0.9, 0.98)
_MOMENTUM = 0.9
# Coefficients and number of steps of the iteration of Newton and Schulz.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return a matrix with the same singular vectors and singular values near 1; ``[N, K]``."""
    a, b, c = _QUINTIC
    wide: Tensor = matrix / (matrix.norm() + 1e-7)
    tall = matrix.shape[0] > matrix.shape[1]
    wide = wide.T if tall else wide
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if tall else wide


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized.

    Args:
        matrices: parameters ``[N, K]``.
    """

    def __init__(self, matrices: Iterable[nn.Parameter]) -> None:
        super().__init__(matrices, {"lr": 0.0})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move each matrix by a step along its gradients so far."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - _MOMENTUM)
                direction = orthogonalized(matrix.grad.lerp(momentum, _MOMENTUM))
                # Entries change by the learning rate, in root mean square.
                scale = math.sqrt(max(matrix.shape))
                matrix.add_(direction, alpha=-group["lr"] * scale)
        return None


class Optimizers:
    """Steps all parameters, each with the optimizer that suits it.

    Args:
        parameters: by name.
        matrices: names of those that are the blocks' matrices.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], matrices: Iterable[str]) -> None:
        inside = set(matrices) & set(parameters)
        split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in parameters.items():
            split[name in inside].append(parameter)
        self._all: list[torch.optim.Optimizer] = []
        if split[True]:
            self._all.append(Muon(split[True]))
        if split[False]:
            self._all.append(torch.optim.AdamW(split[False], betas=_BETAS, weight_decay=0.0))

    def step(self, rate: float) -> None:
        """Take a step at a learning rate, and forget the gradients."""
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return what is remembered of a parameter's gradients, by name."""
        return {
            name: value
            for optimizer in self._all
            for name, value in optimizer.state.get(parameter, {}).items()
            if name != "step"
        }

    def restore(self, parameter: nn.Parameter, moments: Mapping[str, Tensor], steps: int) -> None:
        """Remember moments of a parameter after so many steps."""
        for optimizer in self._all:
            if any(parameter is each for each in optimizer.param_groups[0]["params"]):
                device = parameter.device
                state: dict[str, Any] = {key: each.to(device) for key, each in moments.items()}
                if not isinstance(optimizer, Muon):
                    state["step"] = torch.tensor(float(steps))
                optimizer.state[parameter] = state
