"""Exit codes: one for each kind of error, the same in the help."""

import pytest
from command_line import run

from epmq_deploy import errors
from epmq_deploy.cli.errors import EXIT_CODES, error_text, exit_code


def test_exit_codes_are_as_documented() -> None:
    codes = {
        errors.EpmqError("x"): 1,
        errors.RecipeError("x"): 2,
        errors.MismatchError("x", ["y"]): 3,
        errors.NumericsError("x"): 4,
        errors.GateError("x"): 5,
    }
    assert [exit_code(error) for error in codes] == list(codes.values())
    assert [item.code for item in EXIT_CODES] == [0, *codes.values()]


def test_an_error_of_a_new_kind_has_the_code_of_its_base() -> None:
    class Special(errors.NumericsError):
        """Raised by nothing."""

    assert exit_code(Special("x")) == 4


def test_help_explains_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"{item.code} {item.meaning}" in shown for item in EXIT_CODES)


def test_messages_name_the_flags_that_would_help() -> None:
    options = {
        "overwrite": True,
        "quantize.group_size": 64,
        "quantize.outer": False,
        "quantize.skip": ("*.fc1", "*.fc2"),
        "quantize.target_bits": 4.0,
        "export.target": None,
    }
    error = errors.RecipeError("it does not fit", options=options)
    assert error_text(error, "quantize") == (
        "it does not fit (--overwrite --group-size 64 --no-outer --skip '*.fc1,*.fc2' "
        "--target-bits 4 --target)"
    )
    assert error_text(error, "run") == (
        "it does not fit (--overwrite --set quantize.group_size=64 --set quantize.outer=false "
        "--set 'quantize.skip=*.fc1,*.fc2' --set quantize.target_bits=4 --set export.target)"
    )
    assert error_text(errors.RecipeError("it does not fit"), "run") == "it does not fit"
