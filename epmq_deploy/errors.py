"""The errors a user can meet; each knows the exit code the command line ends with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class EpmqError(Exception):
    """Base of all expected errors; the message says what, where and what to do."""

    exit_code = 1


class RecipeError(EpmqError):
    """A recipe, flag or option is wrong, or an output is in the way."""

    exit_code = 2


class MismatchError(EpmqError):
    """Inputs do not fit together; lists every problem found, not only the first.

    Args:
        subject: what was checked, for the first line.
        problems: one sentence each.
    """

    exit_code = 3

    def __init__(self, subject: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(listed(subject, self.problems))


class NumericsError(EpmqError):
    """Numbers do not agree or could not be computed as asked."""

    exit_code = 4


class GateError(EpmqError):
    """No low-bit graph meets all gates: accuracy, latency and size."""

    exit_code = 5


@contextmanager
def noted(errors: list[EpmqError]) -> Iterator[None]:
    """Add an expected error to ``errors`` instead of raising it, so that others are found too."""
    try:
        yield
    except EpmqError as error:
        errors.append(error)


def joined(subject: str, errors: Sequence[EpmqError]) -> EpmqError:
    """One error that says what all of these say; a single one stays as it is."""
    if len(errors) == 1:
        return errors[0]
    problems = [
        text
        for error in errors
        for text in (error.problems if isinstance(error, MismatchError) else [str(error)])
    ]
    return MismatchError(subject, problems)


def listed(subject: str, problems: Sequence[str]) -> str:
    """One problem as one sentence, several as a list with their number above it."""
    if len(problems) == 1:
        return f"{subject}: {problems[0]}"
    lines = "".join(f"\n  - {problem}" for problem in problems)
    return f"{subject}: {len(problems)} problem(s){lines}"
