"""Iso-C (Marczak et al., arXiv 2502.04959): isotropic merging in the common subspace.

The authors choose the scaling on validation data; FusionBench's configuration has 1.0
(``config/method/isotropic_merging/iso_c.yaml``), its examples for eight tasks take 1.5. The default
is ours and lies between: on the bundled zoo's held-back samples 1.0 scores 67.9 %, 1.3 67.4 and 1.5
63.0 (``benchmarks/results/merge_accuracy.json``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.merging import ops
from epmq_deploy.merging.base import Context, MergeMethod
from epmq_deploy.options.merging import ScaledOptions

if TYPE_CHECKING:
    from torch import Tensor


class IsoCOptions(ScaledOptions):
    """Iso-C; tensors other than matrices are averaged."""

    method: Literal["iso_c"] = "iso_c"
    scaling: float = Field(
        1.3,
        description="factor on the merged task vector; the more tasks, the smaller it should be",
    )


def iso_c(
    base: Tensor, task_vectors: Tensor, options: IsoCOptions, context: Context[None]
) -> Tensor:
    """Merge one tensor.

    Args:
        base: ``[*]``.
        task_vectors: ``[T, *]``.
        options: as they hold for the tensor.
        context: not used.

    Returns:
        For a matrix: the base plus the summed task vectors with every singular value replaced by
        their mean; directions the sum does not have stay out of it. Any other tensor gets the mean
        of the task vectors.
    """
    if base.dim() != 2:
        return base + options.scaling * task_vectors.mean(dim=0)
    flat, values = ops.spectral.polar(task_vectors.sum(dim=0))
    return base + options.scaling * values.sum() / max(len(values), 1) * flat


METHOD = MergeMethod(
    options=IsoCOptions,
    summary="summed task vectors with a flat spectrum (matrices; the rest is averaged)",
    source="Isotropic merging, arXiv 2502.04959",
    merge=iso_c,
)
