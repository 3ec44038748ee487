"""Spherical linear interpolation of two experts (Shoemake, SIGGRAPH 1985)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.errors import NumericsError
from epmq_deploy.lazy import torch
from epmq_deploy.merging.base import Context, MergeMethod
from epmq_deploy.options.merging import MergeOptions

if TYPE_CHECKING:
    from torch import Tensor

# Below this angle (radians) the arc and the straight line are the same in float32.
_STRAIGHT = 1e-4


class SlerpOptions(MergeOptions):
    """SLERP of exactly two experts."""

    method: Literal["slerp"] = "slerp"
    t: float = Field(0.5, ge=0, le=1, description="0 gives the first expert, 1 the second")
    between: Literal["weights", "task_vectors"] = Field(
        "weights",
        description="interpolate the experts' weights or their task vectors; weights of "
        "fine-tunes are nearly parallel, so interpolating them is almost a plain average",
    )


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Return the point at ``t`` of the arc from ``first [*]`` to ``second [*]``.

    Each tensor is taken as one vector. The angle is that between the two directions; lengths are
    interpolated unnormalised, as is usual in merging. For parallel vectors, single parameters, and
    where one vector is zero, the arc is the straight line.

    Raises:
        NumericsError: the vectors are opposite, so that no arc is the shortest.
    """
    one, other = first.flatten().to(torch.float64), second.flatten().to(torch.float64)
    length, other_length = torch.linalg.vector_norm(one), torch.linalg.vector_norm(other)
    if first.numel() == 1 or length == 0 or other_length == 0:
        return torch.lerp(first, second, t)
    one, other = one / length, other / other_length
    # Exact for small angles too, which the arc cosine is not.
    angle = 2 * torch.atan2(
        torch.linalg.vector_norm(one - other), torch.linalg.vector_norm(one + other)
    )
    if angle < _STRAIGHT:
        return torch.lerp(first, second, t)
    if torch.pi - angle < _STRAIGHT:
        raise NumericsError("the experts are opposite to each other there, so SLERP is not defined")
    shares = torch.sin(torch.stack([(1 - t) * angle, t * angle])) / torch.sin(angle)
    return shares[0].float() * first + shares[1].float() * second


def merge(
    base: Tensor, task_vectors: Tensor, options: SlerpOptions, context: Context[None]
) -> Tensor:
    """Interpolate one tensor, ``base [*]`` and ``task_vectors [2, *]``.

    Raises:
        NumericsError: see ``slerp``; names the tensor.
    """
    try:
        if options.between == "task_vectors":
            return base + slerp(task_vectors[0], task_vectors[1], options.t)
        return slerp(base + task_vectors[0], base + task_vectors[1], options.t)
    except NumericsError as error:
        raise NumericsError(f"{context.name}: {error}") from error


def check(options: SlerpOptions, tasks: Sequence[str]) -> list[str]:
    """Check that there are two experts."""
    if len(tasks) == 2:
        return []
    return [f"slerp merges exactly two experts, the recipe has {len(tasks)}; choose another method"]


METHOD = MergeMethod(
    options=SlerpOptions,
    summary="a point on the arc between exactly two experts",
    source="SLERP, Shoemake 1985",
    merge=merge,
    check=check,
)
