"""Exit codes, and errors as a terminal shows them."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epmq_deploy.errors import EpmqError, GateError, MismatchError, NumericsError, RecipeError
from epmq_deploy.options import Options


@dataclass(frozen=True)
class ExitCode:
    """What a command ends with.

    Attributes:
        code: of the process.
        meaning: in a few words.
        error: the error that leads to it; None where there is none.
    """

    code: int
    meaning: str
    error: type[EpmqError] | None = None


# What typer ends with, too.
USAGE = 2

EXIT_CODES = (
    ExitCode(0, "done"),
    ExitCode(1, "unexpected error", EpmqError),
    ExitCode(USAGE, "wrong usage or recipe", RecipeError),
    ExitCode(3, "inputs do not fit together", MismatchError),
    ExitCode(4, "numbers do not agree or could not be computed", NumericsError),
    ExitCode(5, "no low-bit graph meets the gates", GateError),
)


def exit_codes_text() -> str:
    """Return the exit codes as one sentence."""
    return "Exit codes: " + "; ".join(f"{item.code} {item.meaning}" for item in EXIT_CODES) + "."


def exit_code(error: EpmqError) -> int:
    """Return the code of the most specific class that ``error`` belongs to."""
    codes = {item.error: item.code for item in EXIT_CODES}
    return next(codes[kind] for kind in type(error).__mro__ if kind in codes)


# Commands that take options of all sections, by ``--set``.
_WHOLE_RECIPE = ("run", "demo")


def error_text(error: EpmqError, command: str) -> str:
    """Return an error's message with the flags that would help, as ``command`` spells them."""
    flags = flags_text(error.options, whole_recipe=command in _WHOLE_RECIPE)
    return f"{error} ({flags})" if flags else str(error)


def flags_text(options: Mapping[str, Any], *, whole_recipe: bool = False) -> str:
    """Return options as flags.

    Args:
        options: values by recipe key (``quantize.bits``) or keyword of every stage; None for an
            option that is only named.
        whole_recipe: spell recipe keys as values of ``--set``.
    """
    words: list[str] = []
    for key, value in options.items():
        section, _, name = key.rpartition(".")
        flag = f"--{name.replace('_', '-')}"
        if section and whole_recipe:
            words += ["--set", key if value is None else f"{key}={_text(value)}"]
        elif value is None or value is True:
            words.append(flag)
        elif value is False:
            words.append(f"--no-{flag.removeprefix('--')}")
        else:
            words += [flag, _text(value)]
    return shlex.join(words)


def _text(value: Any) -> str:
    """Return an option's value as a flag takes it."""
    if isinstance(value, Mapping):
        return ",".join(f"{pattern}:{_assignments(given)}" for pattern, given in value.items())
    if isinstance(value, tuple | list):
        return ",".join(map(_text, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _assignments(options: Options) -> str:
    """Return the options given to a pattern of layers."""
    given = options.model_dump(exclude_none=True)
    return ",".join(f"{name}={_text(value)}" for name, value in given.items())
