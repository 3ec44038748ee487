"""WUDI-Merging (Cheng et al., arXiv 2503.08099): least interference in the span of task vectors.

Steps and learning rate are the authors', for CLIP. The bundled zoo's task vectors are larger: so
merged it scores 25.2 % on held-back samples, with a rate of 1.4e-4 67.1 and with the exact minimum
66.8 (``benchmarks/results/merge_accuracy.json``).
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.checkpoints.prefetch import ahead
from epmq_deploy.lazy import torch
from epmq_deploy.merging.base import Context, FromTaskVectors, MergeMethod, TaskVectors
from epmq_deploy.options.merging import ScaledOptions

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

# Adam's, as in every implementation of it.
_FIRST, _SECOND, _EPSILON = 0.9, 0.999, 1e-8
# Eigenvalues below this share of the largest are rounding errors of a float64 sum.
_NULL = 1e-10
# How far Adam should be able to move parameters, in root mean squares of their starting values: on
# the bundled zoo a rate for three of them scores as well as the exact minimum.
_AMPLE = 3
_EXACT = "with merge.solver: exact"


class WudiOptions(ScaledOptions):
    """WUDI; tensors other than matrices are averaged."""

    method: Literal["wudi"] = "wudi"
    scaling: float = Field(1.0, description="factor on the merged task vector")
    solver: Literal["adam", "exact"] = Field(
        "adam",
        description="iterate with Adam from the summed task vectors, as in the paper (adam), or "
        "compute the minimum (exact)",
    )
    steps: int = Field(300, ge=0, description="steps of Adam")
    learning_rate: float = Field(
        1e-5,
        gt=0,
        description="learning rate of Adam; no parameter moves further than this times steps, so "
        "task vectors larger than about 1e-3 need a higher rate (or solver exact)",
    )

    def idle(self) -> dict[str, str]:
        """Return the options of Adam where no tensor is merged by Adam."""
        adams = ("steps", "learning_rate")
        idle = {}
        if all(variant.solver == "exact" for variant in self.variants()):
            idle = {name: _EXACT for name in adams if name in self.model_fields_set}
        for pattern, given in self.layers.items():
            if self._with(given).solver == "exact":
                idle |= {f"layers.{pattern}.{name}": _EXACT for name in adams if name in given}
        return super().idle() | idle


def warn_of_short_reach(vectors: TaskVectors, options: WudiOptions) -> None:
    """Warn where Adam cannot move matrices by as much as the values it starts from.

    The merge then stays close to the plain sum of the task vectors. Makes one pass over all task
    vectors, which takes little time compared with Adam.
    """
    adams: dict[str, WudiOptions] = {}
    for name in vectors.names:
        tensor_options = options.for_tensor(name)
        if tensor_options.solver == "adam" and tensor_options.steps:
            adams[name] = tensor_options
    squares: defaultdict[tuple[int, float], float] = defaultdict(float)
    counts: defaultdict[tuple[int, float], int] = defaultdict(int)
    for tensor_options, stack in zip(
        adams.values(), ahead(vectors.of_tensor, adams, 1), strict=True
    ):
        if stack.dim() == 3:
            total = stack.sum(dim=0)
            key = (tensor_options.steps, tensor_options.learning_rate)
            squares[key] += float(torch.linalg.vector_norm(total)) ** 2
            counts[key] += total.numel()
    for (steps, rate), count in counts.items():
        size = math.sqrt(squares[steps, rate] / count)
        if steps * rate < size:
            log.warning(
                "wudi: Adam moves no parameter further than steps * learning_rate = %.2g, but the "
                "summed task vectors it starts from are %.2g (root mean square of the matrices), "
                "so that the merge stays close to their plain sum; set merge.solver: exact "
                "or merge.learning_rate: %.2g",
                steps * rate,
                size,
                _AMPLE * size / steps,
            )
            return


def interference(task_vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the quadratic that WUDI minimises, around the summed task vectors ``S``.

    ``sum_t || (M - tau_t) tau_t^T ||_F^2 / || tau_t ||_F^2`` has, at ``M = S + D``, the gradient
    ``2 (D A + C)``. Task vectors that are zero interfere with nothing.

    Args:
        task_vectors: ``[T, m, n]``.

    Returns:
        ``A [n, n]`` and ``C [m, n]``, in the dtype of the task vectors.
    """
    total = task_vectors.sum(dim=0)
    curvature = total.new_zeros(total.shape[1], total.shape[1])
    slope = torch.zeros_like(total)
    for vector in task_vectors:
        size = vector.square().sum()
        if size > 0:
            gram = vector.T @ vector / size
            curvature += gram
            slope += (total - vector) @ gram
    return curvature, slope


def adam(curvature: Tensor, slope: Tensor, steps: int, learning_rate: float) -> Tensor:
    """Return ``D [m, n]`` after some steps of Adam from zero on the gradient ``2 (D A + C)``."""
    change = torch.zeros_like(slope)
    mean, square = torch.zeros_like(slope), torch.zeros_like(slope)
    for step in range(1, steps + 1):
        gradient = 2 * torch.addmm(slope, change, curvature)
        mean.lerp_(gradient, 1 - _FIRST)
        square.mul_(_SECOND).addcmul_(gradient, gradient, value=1 - _SECOND)
        spread = (square / (1 - _SECOND**step)).sqrt_().add_(_EPSILON)
        change.addcdiv_(mean, spread, value=-learning_rate / (1 - _FIRST**step))
    return change


def exact(curvature: Tensor, slope: Tensor) -> Tensor:
    """Return the smallest ``D [m, n]`` at which the gradient ``2 (D A + C)`` vanishes; float64."""
    values, vectors = torch.linalg.eigh(curvature)
    inverse = torch.where(values > _NULL * values[-1].clamp(min=0), 1 / values, 0.0)
    change: Tensor = -((slope @ vectors) * inverse @ vectors.T)
    return change


def wudi(
    base: Tensor, task_vectors: Tensor, options: WudiOptions, context: Context[None]
) -> Tensor:
    """Merge one tensor.

    Args:
        base: ``[*]``.
        task_vectors: ``[T, *]``.
        options: as they hold for the tensor.
        context: not used.

    Returns:
        For a matrix ``[m, n]``: the base plus the summed task vectors, moved to where they
        interfere less (see ``interference``). Any other tensor gets the mean of the task vectors.
    """
    if base.dim() != 2:
        return base + options.scaling * task_vectors.mean(dim=0)
    if options.solver == "exact":
        change = exact(*interference(task_vectors.to(torch.float64))).float()
    else:
        change = adam(*interference(task_vectors), options.steps, options.learning_rate)
    return base + options.scaling * (task_vectors.sum(dim=0) + change)


METHOD = MergeMethod(
    options=WudiOptions,
    summary="summed task vectors moved to interfere less (matrices; the rest is averaged)",
    source="WUDI-Merging, arXiv 2503.08099",
    merge=wudi,
    statistics=FromTaskVectors(warn_of_short_reach),
)
