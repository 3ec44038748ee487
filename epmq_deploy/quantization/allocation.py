"""Choosing bits per layer under a budget, from each layer's exact error at each width."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """What a layer costs at each width.

    Attributes:
        errors: relative error of the layer's objective, by bits.
        sizes: bits stored with scales and zero points, by bits.
    """

    errors: Mapping[int, float]
    sizes: Mapping[int, float]


def allocate(layers: Mapping[str, Choice], budget: float) -> dict[str, int]:
    """Bits per layer with the least summed error whose summed size is within ``budget``.

    Starts from the smallest widths and spends what is left where it lowers the error most per bit
    stored, along each layer's lower convex hull: what a Lagrangian multiplier would choose
    (Shoham and Gersho, 1988), filled up to the budget.

    Args:
        layers: choices by layer.
        budget: bits for all layers together.

    Raises:
        ValueError: even the smallest widths exceed the budget.
    """
    chosen = {
        name: min(choice.sizes, key=lambda bits: choice.sizes[bits])
        for name, choice in layers.items()
    }
    spent = sum(layers[name].sizes[bits] for name, bits in chosen.items())
    if spent > budget:
        raise ValueError(f"the smallest widths take {spent:g} bits, more than {budget:g}")
    while True:
        best, gain = None, 0.0
        for name, choice in layers.items():
            now = chosen[name]
            for bits, size in choice.sizes.items():
                extra = size - choice.sizes[now]
                saved = choice.errors[now] - choice.errors[bits]
                if extra > 0 and spent + extra <= budget and saved / extra > gain:
                    best, gain = (name, bits), saved / extra
        if best is None:
            return chosen
        name, bits = best
        spent += layers[name].sizes[bits] - layers[name].sizes[chosen[name]]
        chosen[name] = bits


def stored_bits(rows: int, columns: int, bits: int, group_size: int) -> float:
    """Size of a quantized ``[rows, columns]`` weight: codes, float32 scales, zero points.

    Args:
        rows: ``N``.
        columns: ``K``.
        bits: width of codes and zero points.
        group_size: columns per scale, or -1 for all.
    """
    groups = 1 if group_size == -1 else -(-columns // group_size)
    return rows * (columns * bits + groups * (32 + bits))
