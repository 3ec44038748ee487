"""Merging linear layers by least squares, block by block, on the inputs of the experts' layers.

RegMean (Jin et al., arXiv 2212.09849) and RegMean++ (arXiv 2508.03121): the outputs of the merged
layer are the closest to those of every expert's layer on that expert's inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.block_runner import BlockRunner
from epmq_deploy.errors import NumericsError
from epmq_deploy.merging.base import Calibrated, CalibrationData, Context, TaskVectors
from epmq_deploy.merging.layer_inputs import input_grams, runner_of
from epmq_deploy.models import Block
from epmq_deploy.options.merging import RegressionOptions

# Added to the diagonal, relative to its mean: decides in directions without inputs.
_DAMPING = 1e-6


def shrink_off_diagonal(gram: Tensor, factor: float) -> Tensor:
    """Return ``gram [..., K, K]`` with its off-diagonal elements times ``factor``."""
    return factor * gram + (1 - factor) * torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))


def regression_mean(mean: Tensor, cross: Tensor, gram: Tensor) -> Tensor:
    """Return the task vector closest to all experts' outputs: ``(sum tau_t G_t) (sum G_t)^-1``.

    Args:
        mean: of the task vectors, ``[N, K]``; the result in directions without inputs.
        cross: ``sum_t tau_t G_t``, ``[N, K]``.
        gram: ``sum_t G_t``, ``[K, K]``, symmetric and positive semidefinite.

    Returns:
        ``[N, K]``, float32.

    Raises:
        NumericsError: ``gram`` is not positive definite even with damping, by rounding.
    """
    exact = gram.to(torch.float64)
    deviation = cross.to(torch.float64) - mean.to(torch.float64) @ exact
    size = exact.diagonal().mean()
    if float(size) == 0:
        return mean.clone()
    damped = exact + _DAMPING * size * torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise NumericsError(
            "its inputs do not determine the least-squares solution; lower merge.off_diagonal or "
            "raise merge.samples"
        )
    solved = torch.cholesky_solve(deviation.T, factor).T
    return (mean.to(torch.float64) + solved).to(torch.float32)


@dataclass
class _Sums:
    """Sums over experts for layers that share their input; see ``regression_mean``."""

    gram: Tensor | None = None
    mean: dict[str, Tensor] = field(default_factory=dict)
    cross: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self,
        gram: Tensor,
        vectors: Mapping[str, Tensor],
        share: float,
        factors: Mapping[str, float],
    ) -> None:
        # One- or two-word answers give Gram matrices of low rank. In directions without inputs
        # only the damping is left in the denominator, so float32 rounding errors would be
        # amplified a millionfold.
        gram = gram.to(torch.float64)
        self.gram = gram if self.gram is None else self.gram.add_(gram)
        for name, vector in vectors.items():
            product = vector.to(torch.float64) @ shrink_off_diagonal(gram, factors[name])
            if name not in self.cross:
                self.cross[name], self.mean[name] = product, share * vector
            else:
                self.cross[name].add_(product)
                self.mean[name].add_(vector, alpha=share)

    def solve(self, name: str, factor: float) -> Tensor:
        """Return one layer's merged task vector.

        Raises:
            ValueError: no expert was added.
            NumericsError: the sums do not decide the problem; names the layer.
        """
        if self.gram is None:
            raise ValueError("no expert to merge")
        gram = shrink_off_diagonal(self.gram, factor)
        try:
            return regression_mean(self.mean[name], self.cross[name], gram)
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error


class _Regression:
    """Merges the linear layers of one block after the other.

    Args:
        data: samples and experts.
        vectors: the experts' task vectors.
        options: of the method.
        runner: holds the batches.
        merged: the model that the batches run through, whose blocks become the merged ones
            (RegMean++); None where they run through each task's expert.
    """

    def __init__(
        self,
        data: CalibrationData,
        vectors: TaskVectors,
        options: RegressionOptions,
        runner: BlockRunner,
        merged: nn.Module | None,
    ) -> None:
        self._data, self._vectors, self._options = data, vectors, options
        self._runner, self._merged = runner, merged
        self._names = set(vectors.names)

    def merge_block(self, block: Block) -> dict[str, Tensor]:
        """Return merged task vectors of a block's linear layers; batches go on to the next one."""
        self._runner.enter(block)
        groups = [
            [name for layer in group.layers if (name := f"{layer}.weight") in self._names]
            for group in block.groups
        ]
        sums = [_Sums() for _ in groups]
        for index, task in enumerate(self._data.tasks):
            grams = input_grams(self._runner, self._data, task, block, self._merged)
            for group_sums, names, gram in zip(sums, groups, grams, strict=True):
                self._add(group_sums, names, gram, index)
        solved: dict[str, Tensor] = {}
        for group_sums, names in zip(sums, groups, strict=True):
            solved |= {name: group_sums.solve(name, self._factor(name)) for name in names}
        if self._merged is not None:
            inside = [name for name in self._names if name.startswith(f"{block.name}.")]
            _add_to(self._merged, self._vectors, inside, solved)
            self._runner.advance(block)
        return solved

    def _add(self, sums: _Sums, names: list[str], gram: Tensor, index: int) -> None:
        vectors = {
            name: vector.clone()
            for name, vector in zip(names, self._vectors.of_task(index, names), strict=True)
        }
        factors = {name: self._factor(name) for name in names}
        sums.add(gram, vectors, 1 / len(self._data.tasks), factors)

    def _factor(self, name: str) -> float:
        return self._options.for_tensor(name).off_diagonal


def _add_to(
    model: nn.Module, vectors: TaskVectors, names: Sequence[str], solved: Mapping[str, Tensor]
) -> None:
    """Add merged task vectors to a model's parameters: those solved for, or the mean."""
    parameters = dict(model.named_parameters())
    for name in names:
        if name in parameters:
            vector = solved[name] if name in solved else vectors.of_tensor(name).mean(dim=0)
            parameters[name].data.add_(vector)


def merge_linear_layers(
    data: CalibrationData, vectors: TaskVectors, options: RegressionOptions, *, sequential: bool
) -> Calibrated[dict[str, Tensor]]:
    """Return merged task vectors of all linear layers in blocks, by tensor name.

    One block of one expert and one group's Gram matrices are in memory at a time, in addition to
    the result and the activations.

    Args:
        data: samples and experts.
        vectors: the experts' task vectors.
        options: of the method.
        sequential: take the inputs of each block from the merged model's preceding blocks
            (RegMean++) instead of the expert's own.
    """
    model = data.backbone()
    blocks = data.family.blocks(model)
    merged = model if sequential else None
    if merged is not None:
        inside = tuple(f"{block.name}." for block in blocks)
        outside = [name for name in vectors.names if not name.startswith(inside)]
        _add_to(merged, vectors, outside, {})
    runner = runner_of(data, model, blocks, options, student=merged)
    regression = _Regression(data, vectors, options, runner, merged)
    solved: dict[str, Tensor] = {}
    for block in data.progress.track(blocks, "merging blocks"):
        solved |= regression.merge_block(block)
    return Calibrated(solved)


def regressed_or_mean(
    base: Tensor, task_vectors: Tensor, context: Context[dict[str, Tensor]]
) -> Tensor:
    """Return ``base [*]`` plus the tensor's merged task vector: solved for, or the mean."""
    solved = context.statistics.get(context.name)
    return base + (task_vectors.mean(dim=0) if solved is None else solved)
