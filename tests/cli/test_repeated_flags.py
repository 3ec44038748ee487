"""Flags that are given twice: nothing is dropped in silence."""

from pathlib import Path

import pytest
from command_line import run
from tiny_zoo import TinyZoo


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("merge", ["--base", "b", "--expert", "a=x", "--expert", "a=y"], "--expert: a is given"),
        ("merge", ["--base", "b", "--expert", "a=x,b=y,a=z"], "--expert: a is given twice"),
        ("merge", ["--base", "b", "--base", "c", "--expert", "a=x"], "--base is given 2 times"),
        ("merge", ["RECIPE", "--scaling", "0.1", "--scaling", "0.2"], "--scaling is given 2"),
        ("merge", ["RECIPE", "--weights", "a=1", "--weights", "a=2"], "a is given twice"),
        ("merge", ["RECIPE", "-o", "a"], "--output is given 2 times; give it once"),
        ("quantize", ["RECIPE", "--symmetric", "--no-symmetric"], "--symmetric is given 2 times"),
        ("run", ["RECIPE", "--set", "merge.scaling=1", "--set", "merge.scaling=2"], "given twice"),
        ("run", ["RECIPE", "--set", "eval.margin=1,eval.margin=2"], "eval.margin is given twice"),
        ("run", ["RECIPE", "--set", "eval.threads=1,1"], "eval.threads: 1 is given twice"),
        ("run", ["RECIPE", "--set", "merge.layers={a: {}, a: {}}"], "is not YAML"),
    ],
)
def test_what_is_given_twice_is_refused(
    tiny: TinyZoo,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    arguments: list[str],
    message: str,
) -> None:
    given = [str(tiny.recipe) if item == "RECIPE" else item for item in arguments]
    assert run(command, *given, "-o", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layers", [["a:bits=3", "a:bits=4"], ["a:bits=3,bits=4"]])
def test_layers_given_twice(
    tiny: TinyZoo, tmp_path: Path, capsys: pytest.CaptureFixture[str], layers: list[str]
) -> None:
    assert run("merge", tiny.recipe, "-o", tmp_path / "m", "--quiet") == 0
    flags = [part for text in layers for part in ("--layers", text)]
    assert run("quantize", tmp_path / "m", "-o", tmp_path / "q", *flags) == 2
    assert "is given twice; keep one of them" in capsys.readouterr().err


def test_a_switch_may_be_repeated(tiny: TinyZoo, tmp_path: Path) -> None:
    assert run("merge", tiny.recipe, "-o", tmp_path / "m", "-q", "--quiet", "--overwrite") == 0
