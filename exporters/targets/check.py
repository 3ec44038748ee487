"""Making sure that a target can run a quantized model, and what to change where it cannot."""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from epmq_deploy.errors import RecipeError
from epmq_deploy.exporters.formats import formats_of
from epmq_deploy.exporters.targets import TARGETS, Target
from epmq_deploy.exporters.targets.choice import chosen_formats
from epmq_deploy.exporters.targets.layer_grid import LayerGrid
from epmq_deploy.options.quantization import LayerOptions, QuantizeOptions
from epmq_deploy.recipe import ExportOptions

# Tried where a target takes blocks of any size that divide a layer's inputs.
_BLOCKS = (128, 64, 32, 16)


def check_target(
    options: ExportOptions, layers: Mapping[str, LayerGrid], quantized: QuantizeOptions
) -> None:
    """Make sure that a target can run quantized linear layers.

    Args:
        options: of the export.
        layers: by dotted name.
        quantized: the options they were, or will be, quantized with.

    Raises:
        RecipeError: no such target, or layers it cannot run; names the options to quantize with.
    """
    if options.target is None:
        return
    if not any(fmt.low_bit for fmt in formats_of(chosen_formats(options))):
        return
    target = TARGETS.named(options.target)
    if problems := _problems(target, layers):
        helpful = changes(quantized, fitting(target, layers, quantized))
        advice = ", ".join(_assignment(key, value) for key, value in helpful.items())
        raise RecipeError(
            f"target {target.name}: {'; '.join(problems)}: quantize with {advice}", options=helpful
        )


def _problems(target: Target, layers: Mapping[str, LayerGrid]) -> list[str]:
    """Return what keeps layers from running there, one clause per kind."""
    problems = []
    if wide := [name for name, grid in layers.items() if target.refuses_width(grid)]:
        problems.append(
            f"{_named(wide)} stored in 8 bits, but its kernels take {_either(target.widths)}"
        )
    if sizes := [name for name, grid in layers.items() if target.refuses_block(grid)]:
        blocks = _blocks(sizes, layers)
        problems.append(
            f"{_named(sizes)} stored in blocks of {blocks}, but its kernels take "
            f"{_either(target.blocks)}"
        )
    if ragged := [name for name, grid in layers.items() if target.refuses_tail(grid)]:
        inputs = _either(sorted({layers[name].in_features for name in ragged}))
        problems.append(
            f"{_named(ragged)} stored in blocks of {_blocks(ragged, layers)}, which do not "
            f"divide {inputs} inputs, but its kernels need that"
        )
    if shifted := [name for name, grid in layers.items() if target.refuses_zero_points(grid)]:
        problems.append(f"{_named(shifted)} stored with zero points, but its kernels take none")
    return problems


def fitting(
    target: Target, layers: Mapping[str, LayerGrid], options: QuantizeOptions
) -> QuantizeOptions:
    """Return the options with as little changed as lets a target run every layer.

    Layers that no options would make fit are skipped: those outside the blocks where 8 bits are too
    many, and those of too few, or an odd number of, inputs.

    Args:
        target: where to run.
        layers: by dotted name, some of which it cannot run.
        options: they were quantized with.
    """
    inner = {name: grid for name, grid in layers.items() if not grid.outer}
    shifted = [name for name, grid in inner.items() if target.refuses_zero_points(grid)]
    misfits = [
        name
        for name, grid in inner.items()
        if target.refuses_width(grid) or (name in shifted and grid.bits not in target.widths)
    ]
    changed = _with(options, "bits", max(target.widths), misfits)
    changed = _with(changed, "symmetric", True, shifted)
    blocks = [
        name
        for name, grid in inner.items()
        if target.refuses_block(grid) or target.refuses_tail(grid)
    ]
    if blocks:
        sizes = sorted(target.blocks or _BLOCKS, reverse=True)
        tried = [_with(changed, "group_size", size, blocks) for size in sizes]
        changed = min(tried, key=lambda option: len(_unfit(target, layers, option)))
    unfit = _unfit(target, layers, changed)
    return changed.model_copy(update={"skip": (*options.skip, *_patterns(unfit, layers))})


def _unfit(target: Target, layers: Mapping[str, LayerGrid], options: QuantizeOptions) -> list[str]:
    """Layers that cannot run there although quantized with these options."""
    unfit = []
    for name, grid in layers.items():
        layer_options = options if grid.outer else options.for_layer(name)
        bits = grid.bits if grid.outer else options.fixed_bits(name) or _bits(grid, layer_options)
        if target.refuses(grid.with_options(bits, layer_options)):
            unfit.append(name)
    return unfit


def _bits(grid: LayerGrid, options: QuantizeOptions) -> int:
    """Return a layer's bits: those of the options, or those that a budget gave it."""
    if options.target_bits in (4, 8):
        return int(options.target_bits)
    budgeted = options.target_bits is not None or options.target_size is not None
    return grid.bits if budgeted else options.bits


def _with(
    options: QuantizeOptions, name: str, value: Any, layers: Collection[str]
) -> QuantizeOptions:
    """Options that give these layers another value: where they have the present one from."""
    if not layers:
        return options
    budgeted = options.target_bits is not None or options.target_size is not None
    if name == "bits" and budgeted:
        fixed = [layer for layer in layers if options.fixed_bits(layer)]
        if len(fixed) < len(layers):
            # The budget decides the bits of the others.
            target = {"target_bits": float(value), "target_size": None}
            options = options.model_copy(update=target)
        if not fixed:
            return options
        layers = fixed
    giving = [pattern for pattern, given in options.layers.items() if name in given.given]
    matched = {
        layer: [pattern for pattern in giving if fnmatchcase(layer, pattern)] for layer in layers
    }
    patterns = {pattern for matches in matched.values() for pattern in matches}
    update: dict[str, Any] = {} if all(matched.values()) else {name: value}
    update["layers"] = {
        pattern: given.model_copy(update={name: value}) if pattern in patterns else given
        for pattern, given in options.layers.items()
    }
    return options.model_copy(update=update)


def _patterns(names: Sequence[str], layers: Collection[str]) -> list[str]:
    """Patterns of exactly these layers: one for all of a kind."""
    kinds: dict[str, set[str]] = {}
    for name in layers:
        kinds.setdefault(name.rpartition(".")[2], set()).add(name)
    return list(
        dict.fromkeys(
            f"*.{kind}" if len(kinds[kind]) > 1 and kinds[kind] <= set(names) else name
            for name, kind in ((name, name.rpartition(".")[2]) for name in names)
        )
    )


def changes(old: QuantizeOptions, new: QuantizeOptions) -> dict[str, Any]:
    """Return the options of quantization that lead from one to the other, by recipe key."""
    names = ("bits", "target_bits", "group_size", "symmetric", "layers", "skip")
    return {
        f"quantize.{name}": getattr(new, name)
        for name in names
        if getattr(new, name) != getattr(old, name) and getattr(new, name) is not None
    }


def _assignment(key: str, value: Any) -> str:
    """Return an option as a keyword with its value."""
    if isinstance(value, Mapping):
        value = ",".join(map(_assigned, value, value.values()))
    elif isinstance(value, tuple):
        value = ",".join(value)
    elif isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, float):
        value = f"{value:g}"
    return f"{key.rpartition('.')[2]}={value}"


def _assigned(pattern: str, options: LayerOptions) -> str:
    pairs = (f"{name}={str(value).lower()}" for name, value in options.given.items())
    return f"{pattern}:{','.join(pairs)}"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
    return f"{names[0]}{more}"


def _either(values: Sequence[int]) -> str:
    return " or ".join(str(value) for value in values)


def _blocks(names: Sequence[str], layers: Mapping[str, LayerGrid]) -> str:
    return _either(sorted({layers[name].block_size or 0 for name in names}))
