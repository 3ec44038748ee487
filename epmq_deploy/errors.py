"""The errors a user can meet."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class EpmqError(Exception):
    """Base of all expected errors; the message says what, where and what to do.

    Args:
        message: what, where and what to do.
        options: options that would help, with the value to give or None: recipe keys
            (``quantize.group_size``) or keywords of every stage (``overwrite``).
    """

    def __init__(self, message: str = "", *, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.options = dict(options or {})


class RecipeError(EpmqError):
    """A recipe or option is wrong, or an output is in the way."""


class DiskSpaceError(EpmqError):
    """A disk is full, or has too little room for what is to be written."""


class MismatchError(EpmqError):
    """Inputs do not fit together; lists every problem found, not only the first.

    Args:
        subject: what was checked, for the first line.
        problems: one sentence each.
        options: see ``EpmqError``.
    """

    def __init__(
        self, subject: str, problems: Sequence[str], *, options: Mapping[str, Any] | None = None
    ) -> None:
        self.problems = tuple(problems)
        super().__init__(listed(subject, self.problems), options=options)


class NumericsError(EpmqError):
    """Numbers do not agree or could not be computed as asked."""


class GateError(EpmqError):
    """No low-bit graph meets all gates: accuracy, latency and size."""


@contextmanager
def noted(errors: list[EpmqError]) -> Iterator[None]:
    """Collect an expected error in ``errors`` instead of raising it, so that work goes on."""
    try:
        yield
    except EpmqError as error:
        errors.append(error)


def joined(subject: str, errors: Sequence[EpmqError]) -> EpmqError:
    """Return one error that says what all of these say; a single one stays as it is."""
    return errors[0] if len(errors) == 1 else all_problems(subject, errors)


def all_problems(subject: str, errors: Sequence[EpmqError]) -> MismatchError:
    """Return one error with the problems of all of these, each once."""
    problems = list(dict.fromkeys(text for error in errors for text in problems_of(error)))
    options = {key: value for error in errors for key, value in error.options.items()}
    # Several checks may meet the same fault.
    return MismatchError(subject, list(dict.fromkeys(problems)), options=options)


def problems_of(error: EpmqError) -> Sequence[str]:
    """Return the problems that an error lists, or the only one that it is about."""
    return error.problems if isinstance(error, MismatchError) else (str(error),)


def listed(subject: str, problems: Sequence[str]) -> str:
    """Return one problem as a sentence, several as a list below their number."""
    if len(problems) == 1:
        return f"{subject}: {problems[0]}"
    lines = "".join(f"\n  - {problem}" for problem in problems)
    return f"{subject}: {len(problems)} problem(s){lines}"
