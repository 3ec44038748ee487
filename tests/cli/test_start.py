"""What the command line loads and changes before a command runs."""

import json
import os
import subprocess
import sys

import pytest
from command_line import run

HEAVY = ("torch", "numpy", "transformers", "safetensors", "onnx", "onnxruntime", "datasets")
ANSWERED_AT_ONCE = (
    ["--help"],
    ["--version"],
    *([command, "--help"] for command in ("merge", "quantize", "export", "eval", "run", "demo")),
    ["merge", "--wrong"],
    ["merge", "--list"],
    ["quantize", "--list", "--json"],
    ["quantize"],
    ["export"],
    ["merge", "missing.yaml", "-o", "merged"],
    ["run", "missing.yaml", "-o", "out"],
)


def in_new_process(code: str, **environment: str) -> str:
    """Run code in a Python of its own; what it printed last."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("arguments", ANSWERED_AT_ONCE, ids=" ".join)
def test_what_computes_nothing_loads_no_heavy_library(arguments: list[str]) -> None:
    code = f"""
import json, sys
from epmq_deploy.cli.main import main
try:
    main({arguments})
except SystemExit:
    print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""
    assert json.loads(in_new_process(code)) == []


def test_shells_complete_commands_without_heavy_libraries() -> None:
    code = f"""
import io, json, sys
sys.argv = ["epmq"]
from epmq_deploy.cli.main import main
sys.stdout, terminal = io.StringIO(), sys.stdout
try:
    main()
except SystemExit:
    answer, sys.stdout = sys.stdout.getvalue(), terminal
    print(json.dumps([answer.split(), [name for name in {HEAVY} if name in sys.modules]]))
"""
    asked = {"_EPMQ_COMPLETE": "complete_bash", "COMP_WORDS": "epmq qua", "COMP_CWORD": "1"}
    assert json.loads(in_new_process(code, **asked)) == [["quantize"], []]


def test_an_import_changes_nothing_outside() -> None:
    code = """
import json, logging, os, signal, sys, warnings
def state():
    loggers = {
        name: (item.level, item.propagate, len(item.handlers))
        for name, item in logging.root.manager.loggerDict.items()
        if isinstance(item, logging.Logger) and (item.level or item.handlers)
    }
    handler = str(signal.getsignal(signal.SIGTERM))
    return dict(os.environ), list(warnings.filters), handler, loggers, logging.root.handlers[:]
import rich, typer, pydantic
before = state()
import epmq_deploy.cli
import epmq_deploy.cli.main
import epmq_deploy.cli.console
epmq_deploy.cli.console.Terminal(as_json=False, quiet=True)
print(json.dumps(before == state()))
"""
    assert json.loads(in_new_process(code)) is True


def test_quiet_and_loud_commands_do_not_disturb_each_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each starts from the same state of the process."""
    for arguments in (["merge", "--list", "-q"], ["merge", "--list"], ["merge", "--list", "-q"]):
        assert run(*arguments) == 0
        assert bool(capsys.readouterr().out) == ("-q" not in arguments)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("epmq merge --method dar", ["dare", "dare_ties"]),
        ("epmq quantize --preset fe", ["features"]),
    ],
)
def test_shells_complete_choices(words: str, expected: list[str]) -> None:
    code = "import sys; sys.argv = ['epmq']; from epmq_deploy.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={
            **os.environ,
            "_EPMQ_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": "3",
        },
    )
    assert done.stdout.split() == expected
