"""Choosing formats for a target, and refusing options that do not apply to them."""

from collections.abc import Sequence

from epmq_deploy.errors import RecipeError
from epmq_deploy.exporters.formats import FORMATS, GraphFormat, formats_of
from epmq_deploy.exporters.targets import TARGETS
from epmq_deploy.recipe import ExportOptions


def chosen_formats(options: ExportOptions) -> tuple[str, ...]:
    """Return the formats given, else the target's, else the default ones.

    Raises:
        RecipeError: no such target.
    """
    if options.formats is not None:
        return options.formats
    if options.target is not None:
        return TARGETS.named(options.target).formats
    return tuple(name for name, fmt in FORMATS.items() if fmt.default)


def chosen_two_bit_containers(options: ExportOptions) -> bool | None:
    """Return ``two_bit_containers`` as the target allows it.

    Raises:
        RecipeError: no such target, or it has no kernel for what was asked for.
    """
    if options.target is None or TARGETS.named(options.target).two_bit_containers:
        return options.two_bit_containers
    if options.two_bit_containers:
        raise RecipeError(
            f"target {options.target}: its kernels take no 2-bit containers; set "
            "export.two_bit_containers: false",
            options={"export.two_bit_containers": False},
        )
    return False


def check_export(options: ExportOptions) -> None:
    """Make sure that target, formats and options go together, before there are layers to look at.

    Raises:
        RecipeError: target or format does not exist, the target has no kernel for what was asked
            for, or options have no effect on the formats; names every one.
    """
    formats = formats_of(chosen_formats(options))
    problems = _without_effect(options, formats)
    helpful = {}
    try:
        chosen_two_bit_containers(options)
    except RecipeError as error:
        problems.insert(0, str(error))
        helpful = error.options
    if problems:
        raise RecipeError("; ".join(problems), options=helpful)


def _without_effect(options: ExportOptions, formats: Sequence[GraphFormat]) -> list[str]:
    """Return one clause for every option that was given and that no chosen format looks at."""
    names = [fmt.name for fmt in formats]
    problems = []
    if options.two_bit_containers and not any(fmt.stores_two_bits for fmt in formats):
        problems.append(
            f"export.two_bit_containers: no chosen format ({', '.join(names)}) can store 2 bits; "
            "add matmulnbits or leave it out"
        )
    given = options.model_dump(exclude_defaults=True)
    problems += [
        f"export.{option} is for {fmt.name}, which is not among the formats "
        f"({', '.join(names)}); add it or leave the option out"
        for fmt in FORMATS.values()
        for option in fmt.option_names
        if fmt.name not in names and option in given
    ]
    return problems
