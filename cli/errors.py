"""Exit codes, and errors as a terminal shows them."""

from dataclasses import dataclass

from epmq_deploy.errors import EpmqError, GateError, MismatchError, NumericsError, RecipeError


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
