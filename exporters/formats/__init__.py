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
    "all_formats",
    "format_names",
    "formats_of",
    "low_bit_format_names",
]


def all_formats() -> tuple[GraphFormat, ...]:
    """All formats."""
    return tuple(FORMATS.values())


def format_names() -> tuple[str, ...]:
    """Names that recipes may use."""
    return tuple(fmt.name for fmt in all_formats())


def low_bit_format_names() -> tuple[str, ...]:
    """Names of the formats that hold quantized layers."""
    return tuple(fmt.name for fmt in all_formats() if fmt.low_bit)


def formats_of(names: Sequence[str]) -> tuple[GraphFormat, ...]:
    """The formats of these names, in their order.

    Raises:
        RecipeError: a name is unknown or given twice.
    """
    known = {fmt.name: fmt for fmt in all_formats()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RecipeError(
            f"unknown export format {', '.join(map(repr, unknown))}; known: {', '.join(known)}"
        )
    if len(set(names)) != len(names):
        raise RecipeError(f"an export format is given twice: {', '.join(names)}")
    return tuple(known[name] for name in names)
