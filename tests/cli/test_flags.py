"""Flags made from option models: those that take several values, in every command."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from parsed_flags import MODELS, parsed
from tiny_zoo import TASKS, TinyZoo
from typer.main import get_command

from epmq_deploy.cli.main import app
from epmq_deploy.recipe import Recipe, override, parse_recipe

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


@pytest.mark.parametrize(("section", "name"), SEVERAL)
def test_several_values_are_repeated_or_separated_by_commas(section: str, name: str) -> None:
    values, expected = SEVERAL[section, name]
    flag = f"--{name.replace('_', '-')}"
    for arguments in (
        [flag, values[0], flag, values[1]],
        [flag, ",".join(values)],
        [flag, ", ".join(values)],
    ):
        assert getattr(parsed(recipe(), section, arguments), section).model_dump()[name] == expected
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
    assert parsed(recipe(), "export", ["--format", "qdq,fp16"]).export.formats == ("qdq", "fp16")


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


def test_help_groups_flags_by_method() -> None:
    """Where methods describe an option differently, each has its say."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    flags = {section: {item.name: item for item in commands[section].params} for section in MODELS}
    panels = {
        (section, name): getattr(flags[section][name], "rich_help_panel", None)
        for section, name in (
            ("merge", "output"),
            ("merge", "method"),
            ("merge", "scaling"),
            ("merge", "mask_lambda"),
            ("merge", "beta"),
            ("quantize", "bits"),
            ("quantize", "anchor"),
            ("quantize", "samples"),
            ("export", "formats"),
        )
    }
    assert list(panels.values()) == [
        None,
        "Options of every method",
        "Options of several methods",
        "Options of consensus",
        "Options of breadcrumbs, breadcrumbs_ties",
        "Options of every method",
        "Options of epmq",
        "Options of epmq, gptaq, gptq",
        "Options of the recipe",
    ]
    assert "(adamerging | average | " in flags["merge"]["method"].help
    assert "iso_c, iso_cts: factor on the merged" in flags["merge"]["scaling"].help
    assert "(breadcrumbs, breadcrumbs_ties, consensus" in flags["merge"]["search_samples"].help
    assert flags["merge"]["mask_lambda"].help.startswith("strictness of the masks")


def test_an_option_may_be_called_as_a_parameter_of_the_command(
    tiny: TinyZoo, tmp_path: Path
) -> None:
    """``--common`` is an option of iso_cts."""
    flags = ["--method", "iso_cts", "--common", "0.5", "-q"]
    assert run("merge", tiny.recipe, "-o", tmp_path / "m", *flags) == 0
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert manifest["recipe"]["merge"]["common"] == 0.5
