"""ESM (Li et al., arXiv 2602.20208): merge in the directions in which experts change outputs.

Number of samples and polarization are the authors' for CLIP (``esm_utils.py``); they start from a
scaling of 2 and choose a further factor on validation data. The default is ours, chosen on the
bundled zoo's held-back samples. Their code for RoBERTa polarizes layers only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.merging.base import Context, FromData, MergeMethod, TaskVectors
from epmq_deploy.merging.methods.tsv_m import decorrelated
from epmq_deploy.options.merging import PolarizedOptions

if TYPE_CHECKING:
    from torch import Tensor

    from epmq_deploy.merging.base import Calibrated, CalibrationData


class EsmOptions(PolarizedOptions):
    """ESM; matrices outside of blocks are merged as by TSV-M, all other tensors averaged."""

    method: Literal["esm"] = "esm"
    scaling: float = Field(1.5, description="factor on the merged task vector")
    samples: int = Field(32, ge=1, description="calibration samples per task")


def collect(
    data: CalibrationData, vectors: TaskVectors, options: EsmOptions
) -> Calibrated[dict[str, Tensor]]:
    """Merge linear layers by what each expert's layers receive from its own preceding blocks."""
    from epmq_deploy.merging.essential import merge_essential_layers

    return merge_essential_layers(data, vectors, options)


def esm(
    base: Tensor, task_vectors: Tensor, options: EsmOptions, context: Context[dict[str, Tensor]]
) -> Tensor:
    """Merge one tensor.

    Args:
        base: ``[*]``.
        task_vectors: ``[T, *]``.
        options: as they hold for the tensor.
        context: with the merged task vectors of linear layers in blocks.

    Returns:
        ``base + scaling *`` what was merged for a linear layer; for another matrix the merged task
        vector of TSV-M, for any other tensor the mean.
    """
    merged = context.statistics.get(context.name)
    if merged is None:
        merged = decorrelated(task_vectors) if base.dim() == 2 else task_vectors.mean(dim=0)
    return base + options.scaling * merged


METHOD = MergeMethod(
    options=EsmOptions,
    summary="each expert's directions of largest change of outputs, decorrelated (needs data)",
    source="ESM, arXiv 2602.20208",
    merge=esm,
    statistics=FromData(collect),
)
