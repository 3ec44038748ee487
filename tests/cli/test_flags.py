"""Flags made from option models: those that take several values, in every command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import run
from tiny_zoo import TASKS, TinyZoo
from typer.main import get_command
from typer.testing import CliRunner

from epmq_deploy.calibration.targets import TARGETS
from epmq_deploy.cli.flags import with_flags
from epmq_deploy.cli.main import app
from epmq_deploy.merging.methods import MERGE_METHODS
from epmq_deploy.options import Options
from epmq_deploy.recipe import EvalOptions, ExportOptions, Recipe, override, parse_recipe

MODELS: dict[str, list[type[Options]]] = {
    "merge": [method.options for method in MERGE_METHODS.values()],
    "quantize": [target.options for target in TARGETS.values()],
    "export": [ExportOptions],
    "eval": [EvalOptions],
}
# Of every flag that takes several values two, and what the recipe then has.
SEVERAL: dict[tuple[str, str], tuple[tuple[str, str], Any]] = {
    ("merge", "layers"): (
        ("*.fc1.*:scaling=0.1", "*.fc2.*:scaling=0.2"),
        {"*.fc1.*": {"scaling": 0.1}, "*.fc2.*": {"scaling": 0.2}},
    ),
    ("merge", "weights"): (("a=1", "b=2"), {"a": 1.0, "b": 2.0}),
    ("quantize", "layers"): (
        ("*.fc1:bits=8,group_size=64", "x.fc2:bits=3"),
        {
            "*.fc1": {"bits": 8, "group_size": 64, "symmetric": None},
            "x.fc2": {"bits": 3, "group_size": None, "symmetric": None},
        },
    ),
    ("quantize", "skip"): (("*.fc1", "*.fc2"), ("*.fc1", "*.fc2")),
    ("export", "formats"): (("qdq", "fp16"), ("qdq", "fp16")),
    ("eval", "threads"): (("1", "2"), (1, 2)),
    ("eval", "latency_batches"): (("1", "8"), (1, 8)),
}


def recipe() -> Recipe:
    tasks = {"a": {"expert": "a"}, "b": {"expert": "b"}}
    return parse_recipe({"base": {"path": "base"}, "tasks": tasks}, "test")


def parsed(section: str, arguments: Sequence[str]) -> Recipe:
    """The recipe with a section's flags as a command of its own reads them."""
    found: list[Recipe] = []
    small = typer.Typer()

    @small.command()
    @with_flags(MODELS[section])
    def command(*, flags: dict[str, Any]) -> None:
        found.append(override(recipe(), section, flags))

    result = CliRunner().invoke(small, arguments)
    assert result.exit_code == 0, result.output
    return found[0]


@pytest.mark.parametrize(("section", "name"), SEVERAL)
def test_several_values_are_repeated_or_separated_by_commas(section: str, name: str) -> None:
    values, expected = SEVERAL[section, name]
    flag = f"--{name.replace('_', '-')}"
    for arguments in (
        [flag, values[0], flag, values[1]],
        [flag, ",".join(values)],
        [flag, ", ".join(values)],
    ):
        assert getattr(parsed(section, arguments), section).model_dump()[name] == expected
    together = override(recipe(), section, {name: ",".join(values)})
    assert getattr(together, section).model_dump()[name] == expected


def test_no_flag_that_takes_several_values_is_missing_here() -> None:
    """And the help of each says how to give them."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    found = {
        (section, option.name): option.help
        for section in MODELS
        for option in commands[section].params
        if option.multiple
    }
    assert found.keys() - {("merge", "expert")} == SEVERAL.keys()
    for section in ("run", "demo"):
        found |= {
            (section, item.name): item.help for item in commands[section].params if item.multiple
        }
    assert all("repeat the flag or separate them by commas" in text for text in found.values())


def test_format_is_formats() -> None:
    assert parsed("export", ["--format", "qdq,fp16"]).export.formats == ("qdq", "fp16")


def test_experts_in_one_flag(tiny: TinyZoo, tmp_path: Path) -> None:
    experts = ",".join(f"{task}={tiny.expert(task)}" for task in TASKS)
    assert run("merge", "--base", tiny.base, "--expert", experts, "-o", tmp_path / "m", "-q") == 0
    made = json.loads((tmp_path / "m" / "manifest.json").read_text())["recipe"]
    assert set(made["tasks"]) == set(TASKS)


def test_assignments_in_one_flag(
    tiny: TinyZoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = "quantize.bits=5,quantize.skip=a,b,export.formats=[qdq, fp16],eval.margin=-1"
    assert run("run", tiny.recipe, "-o", tmp_path / "out", "--set", settings) == 2
    assert "quantize.bits: Input should be 2, 3, 4 or 8, found 5" in capsys.readouterr().err
    settings = settings.replace("bits=5", "bits=3")
    assert run("run", tiny.recipe, "-o", tmp_path / "out", "--set", settings) == 2
    assert "eval.margin: " in capsys.readouterr().err
