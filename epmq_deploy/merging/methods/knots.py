"""KnOTS-TIES (Stoica et al., arXiv 2410.19735): TIES in a basis that all experts share.

Made for LoRA experts, whose task vectors lie in different subspaces, so that entry by entry they
have little to do with each other. Density and mean are the authors' (``vitB_r16_knots_ties.py``),
who choose the scaling on validation data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.merging import ops
from epmq_deploy.merging.base import Context, FromTaskVectors, MergeMethod, TaskVectors
from epmq_deploy.merging.methods.ties import (
    TiesStatistics,
    TrimOptions,
    agreeing,
    global_statistics,
)

if TYPE_CHECKING:
    from torch import Tensor

    from epmq_deploy.checkpoints.tensors import StoredTensor


class KnotsOptions(TrimOptions):
    """KnOTS-TIES; tensors other than matrices are averaged."""

    method: Literal["knots"] = "knots"
    scaling: float = Field(0.6, description="factor on the merged task vector")


@dataclass(frozen=True)
class Alignment:
    """The shared bases of matrices, on disk, and the statistics of TIES in them.

    Attributes:
        folder: deleted with this object.
        bases: by tensor name, as of ``shared_basis``; see ``aligned``.
        ties: of all aligned task vectors together.
    """

    folder: tempfile.TemporaryDirectory[str]
    bases: Mapping[str, StoredTensor]
    ties: TiesStatistics


@dataclass(frozen=True)
class AlignedTaskVectors:
    """The ``TaskVectors`` of matrices, in the coordinates of their shared bases.

    Attributes:
        vectors: the experts' task vectors.
        bases: of the matrices, by name.
        sizes: number of coordinates, by name.
    """

    vectors: TaskVectors
    bases: Mapping[str, StoredTensor]
    sizes: Mapping[str, int]

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the experts."""
        return self.vectors.tasks

    @property
    def names(self) -> Sequence[str]:
        """Names of the matrices."""
        return tuple(self.bases)

    def size(self, name: str) -> int:
        """Return the number of coordinates of a matrix."""
        return self.sizes[name]

    def of_task(self, index: int, names: Sequence[str]) -> Iterator[Tensor]:
        """Yield one expert's coordinates, matrix by matrix."""
        for name, vector in zip(names, self.vectors.of_task(index, names), strict=True):
            yield aligned(vector[None], self.bases[name].load().to(vector.device))[0]

    def of_tensor(self, name: str) -> Tensor:
        """Return all experts' coordinates of one matrix."""
        vectors = self.vectors.of_tensor(name)
        return aligned(vectors, self.bases[name].load().to(vectors.device))


def aligned(matrices: Tensor, basis: Tensor) -> Tensor:
    """Return coordinates ``[T, r, *]`` of ``matrices [T, m, n]`` in a basis of the shorter side."""
    return basis.T @ upright(matrices)


def upright(matrices: Tensor) -> Tensor:
    """Transpose ``matrices [..., m, n]`` that are taller than wide."""
    return matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices


def align(vectors: TaskVectors, options: KnotsOptions) -> Alignment:
    """Compute the shared basis of every matrix, and what TIES needs to know in these bases."""
    from safetensors.torch import save_file

    from epmq_deploy.checkpoints.tensors import stored_tensors

    folder = tempfile.TemporaryDirectory(prefix="epmq-knots-")
    sizes, files = {}, []
    for index, name in enumerate(vectors.names):
        matrices = vectors.of_tensor(name)
        if matrices.dim() == 3:
            basis = ops.spectral.shared_basis(upright(matrices))
            files.append(Path(folder.name) / f"{index}.safetensors")
            save_file({name: basis.cpu().contiguous()}, files[-1])
            sizes[name] = basis.shape[1] * max(matrices.shape[1:])
    bases = stored_tensors(files)
    inside = AlignedTaskVectors(vectors, bases, sizes)
    return Alignment(folder, bases, global_statistics(inside, options))


def knots(
    base: Tensor, task_vectors: Tensor, options: KnotsOptions, context: Context[Alignment]
) -> Tensor:
    """Merge one tensor.

    Args:
        base: ``[*]``.
        task_vectors: ``[T, *]``.
        options: as they hold for the tensor.
        context: with the shared bases, and statistics of all task vectors in them.

    Returns:
        For a matrix: the base plus ``scaling *`` what TIES makes of the task vectors' coordinates
        in the left singular vectors of all of them side by side (of their transposes, where they
        are taller than wide). Any other tensor gets the mean of the task vectors.
    """
    if base.dim() != 2:
        return base + options.scaling * task_vectors.mean(dim=0)
    basis = context.statistics.bases[context.name].load().to(task_vectors.device)
    merged = basis @ agreeing(aligned(task_vectors, basis), options, context.statistics.ties)
    turned = base.shape[0] > base.shape[1]
    return base + options.scaling * (merged.T if turned else merged)


METHOD = MergeMethod(
    options=KnotsOptions,
    summary="TIES in a basis that all experts share, for LoRA experts (matrices; the rest is "
    "averaged)",
    source="KnOTS, arXiv 2410.19735",
    merge=knots,
    statistics=FromTaskVectors(align),
)
