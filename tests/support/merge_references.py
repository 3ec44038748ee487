"""Least-squares merging as the papers write it, and the rows it takes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def seen_by(run: Callable[[], object], layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Rows ``[n, K]`` that layers receive while ``run`` runs."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = args[0].reshape(-1, args[0].shape[-1]).double()

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return found


def plain_regmean(weights: list[Tensor], rows: list[Tensor], factor: float) -> Tensor:
    """``W^T = (sum G_t)^-1 sum G_t W_t^T`` with reduced off-diagonals, as the paper writes it."""
    grams = []
    for inputs in rows:
        gram = inputs.T @ inputs / len(inputs)
        mask = torch.full_like(gram, factor).fill_diagonal_(1.0)
        grams.append(gram * mask)
    total = sum(gram @ weight.double().T for gram, weight in zip(grams, weights, strict=True))
    assert isinstance(total, Tensor)
    return (torch.linalg.inv(sum(grams)) @ total).T.float()


def plain_esm(weights: list[Tensor], rows: list[Tensor], power: float) -> Tensor:
    """Merge task vectors ``[m, n]`` by their output changes, as the authors' code writes it.

    Args:
        weights: task vectors.
        rows: each expert's inputs ``[t, n]``.
        power: of relative norms of tasks and columns.
    """
    count = len(weights[0]) // len(weights)
    mean = sum(float(weight.norm()) for weight in weights) / len(weights)
    lefts, rights = [], []
    for weight, inputs in zip(weights, rows, strict=True):
        weight = weight.double()
        _, s, directions = torch.linalg.svd(inputs.double() @ weight.T)
        variances = (s**2)[:count]
        scales = (variances / variances.mean()) ** 0.15
        scales = scales / scales.mean()
        right = directions @ weight
        right = right * right.norm() ** power / mean**power
        lefts.append(directions[:count].T * scales)
        rights.append(scales[:, None] * right[:count])
    left, right = torch.cat(lefts, dim=1), torch.cat(rights, dim=0)
    columns = right.norm(dim=0)
    right = right * (columns / columns.mean()) ** power
    flat = []
    for side in (left, right):
        u, s, v = torch.linalg.svd(side, full_matrices=False)
        flat.append(u @ v * s.mean())
    return (flat[0] @ flat[1]).float()
