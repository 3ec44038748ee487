"""Statistics from weights alone, for experts that come without data.

Fine-tuning updates of a linear layer are sums of ``gradient x^T`` over its inputs ``x``, so a task
vector's rows lie in the span of the inputs its task was trained on, and ``tau^T tau`` stands in for
``X^T X`` (as in WUDI-Merging, Cheng et al., arXiv 2503.08099).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from epmq_deploy.calibration.statistics import TaskStatistics


def weight_statistics(experts: Mapping[str, Tensor], bases: Mapping[str, Tensor]) -> TaskStatistics:
    """One task's statistics for layers that share an input, from their task vectors.

    Args:
        experts: weights ``[N, K]`` by layer.
        bases: the base's, likewise.

    Returns:
        Statistics with the layers' summed ``tau^T tau`` as Gram matrix, the experts' weights as
        guides, and neither means nor tokens.
    """
    first = next(iter(experts.values()))
    gram = torch.zeros(first.shape[1], first.shape[1], device=first.device)
    for layer, expert in experts.items():
        vector = (expert - bases[layer]).to(torch.float32)
        gram += vector.T @ vector
    gram = (gram + gram.T) / 2
    return TaskStatistics(
        gram,
        torch.zeros(first.shape[1], dtype=torch.float64, device=first.device),
        tokens=0,
        cross={layer: expert.to(torch.float32) @ gram for layer, expert in experts.items()},
        output_mean={
            layer: torch.zeros(expert.shape[0], dtype=torch.float64, device=expert.device)
            for layer, expert in experts.items()
        },
    )
