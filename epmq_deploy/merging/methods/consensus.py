"""Consensus Task Arithmetic with TALL masks (Wang et al., arXiv 2405.07813).

Two active tasks are the authors' choice (``prun_thre_k`` in ``config/method/consensus.yaml``). They
choose lambda from 0.2 to 0.6 and the scaling on validation data; the default is the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.lazy import torch
from epmq_deploy.merging.base import Context, MergeMethod
from epmq_deploy.options.merging import ScaledOptions

if TYPE_CHECKING:
    from torch import Tensor


class ConsensusOptions(ScaledOptions):
    """Consensus Task Arithmetic."""

    method: Literal["consensus"] = "consensus"
    scaling: float = Field(0.3, description="factor on the merged task vector")
    mask_lambda: float = Field(
        0.4,
        gt=0,
        description="strictness of the masks: the larger, the fewer parameters are active",
    )
    active_tasks: int = Field(
        2, ge=1, description="number of tasks in which a parameter must be active to be merged"
    )


def tall_masks(task_vectors: Tensor, mask_lambda: float) -> Tensor:
    """Tell where each task is active, bool ``[T, *]``, from task vectors ``[T, *]``.

    A parameter is active in a task when it moved from the base at least ``mask_lambda`` times as
    far as the summed task vector misses the expert by: ``|tau_t| > lambda |sum tau - tau_t|``.
    """
    missed = (task_vectors.sum(dim=0) - task_vectors).abs()
    return task_vectors.abs() > mask_lambda * missed


def consensus(
    base: Tensor, task_vectors: Tensor, options: ConsensusOptions, context: Context[None]
) -> Tensor:
    """Add ``scaling * sum_t task_vectors_t`` to the base where enough tasks are active.

    ``base [n]``, ``task_vectors [T, n]``.
    """
    active = tall_masks(task_vectors, options.mask_lambda).sum(dim=0)
    agreed = torch.where(active >= options.active_tasks, task_vectors.sum(dim=0), 0.0)
    return base + options.scaling * agreed


def check(options: ConsensusOptions, tasks: Sequence[str]) -> list[str]:
    """Check that parameters can be active in as many tasks as asked for."""
    if options.active_tasks <= len(tasks):
        return []
    return [
        f"merge.active_tasks is {options.active_tasks}, but there are {len(tasks)} experts, so "
        "nothing would be merged"
    ]


METHOD = MergeMethod(
    options=ConsensusOptions,
    summary="sum of task vectors where at least two tasks use the parameter",
    source="Consensus merging with TALL masks, arXiv 2405.07813",
    merge=consensus,
    elementwise=True,
    check=check,
)
