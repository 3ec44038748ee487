"""From the labels of a data set to the class numbers of a head, by name where both name them.

An expert and the data it is measured on often number the same classes differently: MNLI experts
alone come in three orders. So numbers count only where there are no names, and that is said.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from epmq_deploy.errors import RecipeError
from epmq_deploy.models.problem_types import SINGLE_LABEL
from epmq_deploy.recipe import ProblemType

# What transformers calls classes that nobody named.
UNNAMED = "LABEL_"
_SHOWN = 10
_BOOLEANS = ("false", "true")


@dataclass(frozen=True)
class HeadClasses:
    """The classes of a task's head.

    Attributes:
        count: how many; None where the head is not known yet.
        names: in the order of its logits; None where nobody named them.
        problem_type: what its logits mean.
    """

    count: int | None = None
    names: tuple[str, ...] | None = None
    problem_type: ProblemType = SINGLE_LABEL


@dataclass(frozen=True)
class ClassLabels:
    """The labels of a task's samples as class numbers of its head.

    Attributes:
        numbers: ``[n]``.
        assumption: what was assumed because names are missing; empty where nothing was.
    """

    numbers: list[int]
    assumption: str = ""


def class_labels(
    values: Sequence[Any],
    rows: Sequence[int],
    data_names: Sequence[str] | None,
    head: HeadClasses,
    where: str,
) -> ClassLabels:
    """Translate the labels of a data set to the class numbers of a head.

    Args:
        values: whole numbers, booleans or names.
        rows: where each value stands, for messages.
        data_names: the data's classes in the order of their numbers; None where it has no names.
        head: the classes to translate to.
        where: names the task, the data and the column, for messages.

    Raises:
        RecipeError: a label is missing, is no class, or names do not fit together.
    """
    spoken = head.names is not None and _by_name(_BOOLEANS, head.names) is not None
    if spoken and all(isinstance(value, bool) for value in values):
        data_names = data_names or _BOOLEANS
    named = any(isinstance(value, str) for value in values)
    if named:
        texts = [_text(value, row, where) for value, row in zip(values, rows, strict=True)]
        data_names = data_names or sorted(set(texts))
        places = {name: number for number, name in enumerate(data_names)}
        if unknown := sorted(set(texts) - set(places)):
            raise RecipeError(
                f"{where} holds {unknown[0]!r}, which is none of {listed(data_names)}"
            )
        numbers = [places[text] for text in texts]
    else:
        numbers = [_number(value, row, where) for value, row in zip(values, rows, strict=True)]
    if data_names is None:
        return _numbered(numbers, rows, head, where)
    for number, row in zip(numbers, rows, strict=True):
        if number >= len(data_names):
            raise RecipeError(
                f"{where}: row {row} holds {number}, but the data name only {len(data_names)} "
                f"classes ({listed(data_names)})"
            )
    head_numbers, assumption = match_classes(data_names, head, where, from_texts=named)
    return ClassLabels([head_numbers[number] for number in numbers], assumption)


def match_classes(
    data_names: Sequence[str], head: HeadClasses, where: str, *, from_texts: bool = False
) -> tuple[list[int], str]:
    """Find the head's class number of each of the data's classes.

    Args:
        data_names: in the order of the data's numbers.
        head: the classes to find them among.
        where: names the task and the data, for messages.
        from_texts: whether the data's order is no more than that of the names.

    Returns:
        The head's class number of each name, and what was assumed to find it.

    Raises:
        RecipeError: a class of the data is none of the head's, or cannot be told.
    """
    if head.names is not None:
        by_name = _by_name(data_names, head.names)
        if by_name is not None:
            return by_name, ""
    as_numbers = _as_numbers(data_names, head.count, where)
    if as_numbers is not None:
        start = int(_digits(data_names[0])) - as_numbers[0]
        return as_numbers, (
            f"{where}: the classes {listed(data_names)} are taken as the numbers of the head's "
            f"classes, counted from {start}"
        )
    if head.names is not None:
        plain = [_plain(name) for name in head.names]
        twice = [name for name in head.names if plain.count(_plain(name)) > 1]
        if twice:
            raise RecipeError(
                f"{where}: two of the head's classes are called {twice[0]!r}, so names do not "
                "tell which one the data mean; give label_names: same_as_head if the data's "
                "numbers are the head's"
            )
        raise RecipeError(
            f"{where}: the data and the head name different classes; the data: "
            f"{listed(data_names)}; the head: {listed(head.names)}; list the data's classes in the "
            "data's order and the head's words as label_names, or give label_names: same_as_head "
            "if the data's numbers are the head's"
        )
    if head.count is None:
        return list(range(len(data_names))), ""
    if from_texts or len(data_names) != head.count:
        raise RecipeError(
            f"{where}: the data name {len(data_names)} classes ({listed(data_names)}), and the "
            f"head has {head.count} without names; name these in their order as head.classes"
        )
    return list(range(len(data_names))), (
        f"{where}: the head does not name its classes; they are taken in the data's order "
        f"({listed(data_names)})"
    )


def listed(names: Sequence[str]) -> str:
    """Return names for a message, the first few of many."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _numbered(
    numbers: list[int], rows: Sequence[int], head: HeadClasses, where: str
) -> ClassLabels:
    """Take numbers without names as the head's; as its names, where all of these are numbers."""
    if head.names is not None and all(_digits(name) for name in head.names):
        named = {int(_digits(name)): place for place, name in enumerate(head.names)}
        if set(numbers) <= named.keys():
            said = f"{where} holds numbers, taken as the names of the head's classes"
            return ClassLabels([named[number] for number in numbers], said)
    start = 0
    if head.count is not None and numbers and min(numbers) > 0 and max(numbers) == head.count:
        start = 1
    for number, row in zip(numbers, rows, strict=True):
        if head.count is not None and number - start >= head.count:
            raise RecipeError(
                f"{where}: row {row} holds label {number}, but its head has {head.count} classes, "
                f"0 to {head.count - 1}"
            )
    if head.names is None and not start:
        return ClassLabels(numbers)
    names = head.names or tuple(f"class {number}" for number in range(head.count or 0))
    order = listed([f"{number} {name}" for number, name in enumerate(names, start)])
    return ClassLabels(
        [number - start for number in numbers],
        f"{where} holds numbers without names, taken as the head's classes ({order})",
    )


def _by_name(data_names: Sequence[str], head_names: Sequence[str]) -> list[int] | None:
    """Return the head's number of each name; None unless the head has every name once."""
    for spelled in (str, _plain):
        known = [spelled(name) for name in head_names]
        wanted = [spelled(name) for name in data_names]
        if wanted == known:
            return list(range(len(known)))
        single = len(set(wanted)) == len(wanted) and all(known.count(name) == 1 for name in wanted)
        if single:
            places = {name: number for number, name in enumerate(known)}
            return [places[name] for name in wanted]
    return None


def _as_numbers(names: Sequence[str], count: int | None, where: str) -> list[int] | None:
    """Return the class numbers that names like ``7`` or ``LABEL_7`` stand for; None for others."""
    digits = [_digits(name) for name in names]
    if not all(digits):
        return None
    numbers = [int(text) for text in digits]
    if count is None or (0 in numbers and max(numbers) < count):
        return numbers
    if 0 not in numbers and max(numbers) == count:
        return [number - 1 for number in numbers]
    if max(numbers) < count:
        raise RecipeError(
            f"{where}: the classes {listed(names)} may count the head's {count} classes from 0 or "
            "from 1; list their names in the head's words as label_names"
        )
    raise RecipeError(
        f"{where}: the classes {listed(names)} are not among the head's {count} classes; list "
        "their names in the head's words as label_names"
    )


def _digits(name: str) -> str:
    """Return the digits of a name that is a number, with or without transformers' prefix."""
    text = name.strip().removeprefix(UNNAMED)
    return text if text.isascii() and text.isdigit() else ""


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _text(value: Any, row: int, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{where}: row {row} holds {_shown(value)} where others hold class names")
    return value.strip()


def _number(value: Any, row: int, where: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int):
        raise RecipeError(
            f"{where} must hold whole numbers or names of classes, row {row} holds {_shown(value)}"
        )
    if value < 0:
        raise RecipeError(
            f"{where}: row {row} holds {value}, which is how data sets mark samples without a "
            "label; choose a split with labels, or leave these rows out"
        )
    return int(value)


def _shown(value: Any) -> str:
    return "no label" if value is None else repr(value)
