"""One figure per layer as a heat map: blocks across, kinds of layers down."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from epmq_deploy.runtime.report.markup import Markup, element, figure
from epmq_deploy.runtime.report.plots import WIDTH

_NAMES, _ROW, _HEAD = 118.0, 16.0, 14.0
_LETTERS = 21
# Narrower cells have no room for a number.
_TEXT_FITS = 19.0
_WIDEST = 40.0
# Above that, the text on a cell could not be read.
_OPACITY = 0.75
_BLOCK = re.compile(r"^(?P<stack>.*?)\.(?P<block>\d+)\.(?P<kind>.+)$")


@dataclass(frozen=True)
class _Stack:
    """Blocks of one kind, e.g. an encoder's: figures by kind of layer and block."""

    name: str
    cells: Mapping[str, Mapping[str, str]]
    blocks: Sequence[str]


def heat_maps(
    name: str,
    title: str,
    values: Mapping[str, float],
    heat: Callable[[float], float],
    show: Callable[[float], str],
) -> list[Markup]:
    """A picture per stack of blocks; layers outside any block have one of their own.

    Args:
        name: prefix of the pictures' ids.
        title: what is shown.
        values: figures by the layer's dotted name, in running order.
        heat: strength of the colour, 0 to 1.
        show: the figure in a cell, short.
    """
    pictures = []
    for index, stack in enumerate(_stacks(values)):
        where = f" in {stack.name}" if stack.name else " outside the blocks"
        pictures.append(_picture(f"{name}-{index}", title + where, stack, values, heat, show))
    return pictures


def _stacks(names: Mapping[str, float]) -> list[_Stack]:
    found: dict[str, dict[str, dict[str, str]]] = {}
    for layer in names:
        match = _BLOCK.match(layer)
        stack, block, kind = match.group("stack", "block", "kind") if match else ("", "", layer)
        found.setdefault(stack, {}).setdefault(kind, {})[block] = layer
    return [
        _Stack(stack, cells, list(dict.fromkeys(block for row in cells.values() for block in row)))
        for stack, cells in found.items()
    ]


def _picture(
    name: str,
    title: str,
    stack: _Stack,
    values: Mapping[str, float],
    heat: Callable[[float], float],
    show: Callable[[float], str],
) -> Markup:
    width = min(_WIDEST, (WIDTH - _NAMES) / len(stack.blocks))
    # Numbers of blocks that would touch are left out.
    every = -(-14 // int(max(width, 1)))
    shapes = [
        element("text", block, class_="middle", x=_NAMES + (column + 0.5) * width, y=10)
        for column, block in enumerate(stack.blocks)
        if column % every == 0
    ]
    shapes.append(_label(stack.name, 10, "end small"))
    for line, (kind, row) in enumerate(stack.cells.items()):
        y = _HEAD + line * _ROW
        shapes.append(_label(kind, y + 11, "end small"))
        for column, block in enumerate(stack.blocks):
            if block in row:
                value = values[row[block]]
                tip = f"{row[block]}: {show(value)}"
                shapes.append(_cell(_NAMES + column * width, y, width, heat(value), tip))
                if width >= _TEXT_FITS:
                    x = _NAMES + (column + 0.5) * width
                    shapes.append(
                        element("text", show(value), class_="middle small", x=x, y=y + 11)
                    )
    worst = max(values, key=lambda layer: heat(values[layer]))
    said = f"Blocks across, kinds of layers down. Worst of all: {worst} with {show(values[worst])}."
    return figure(name, title, said, WIDTH, _HEAD + len(stack.cells) * _ROW, *shapes)


def _label(name: str, y: float, class_: str) -> Markup:
    """A name left of the cells, its end where it is long."""
    shown = name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}"
    return element("text", shown, class_=class_, x=_NAMES - 5, y=y)


def _cell(x: float, y: float, width: float, heat: float, tip: str) -> Markup:
    return element(
        "rect",
        element("title", tip),
        class_="cell",
        x=x,
        y=y,
        width=width - 1,
        height=_ROW - 1,
        fill_opacity=_OPACITY * min(max(heat, 0.0), 1.0),
    )
