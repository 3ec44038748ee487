"""Export formats: one module each, found by its ``FORMAT``."""

from collections.abc import Sequence

from epmq_deploy.errors import RecipeError
from epmq_deploy.exporters.formats.base import GraphFormat
from epmq_deploy.registry import Registry

FORMATS: Registry[GraphFormat] = Registry(
    "export format", __name__, "FORMAT", "epmq_deploy.formats"
)

__all__ = [
    "FORMATS",
    "GraphFormat",
    "format_names",
    "formats_of",
    "low_bit_format_names",
]


def format_names() -> tuple[str, ...]:
    """Return the names that recipes may use."""
    return tuple(FORMATS)


def low_bit_format_names() -> tuple[str, ...]:
    """Return the names of the formats that hold quantized layers."""
    return tuple(name for name, fmt in FORMATS.items() if fmt.low_bit)


def formats_of(names: Sequence[str]) -> tuple[GraphFormat, ...]:
    """Return the formats of these names, in their order.

    Raises:
        RecipeError: a name is unknown or given twice.
    """
    formats = tuple(map(FORMATS.named, names))
    if len(set(names)) != len(names):
        raise RecipeError(f"an export format is given twice: {', '.join(names)}")
    return formats
