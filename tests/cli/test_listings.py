"""``--list``: everything a registry holds, as a table and as data."""

import json

import pytest
from command_line import run

from epmq_deploy.exporters.formats import FORMATS
from epmq_deploy.exporters.targets import TARGETS
from epmq_deploy.registry import QUANTIZATION_METHODS


def test_quantization_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", "--list") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in QUANTIZATION_METHODS)
    assert run("quantize", "--list", "--json") == 0
    methods = {item["name"]: item for item in json.loads(capsys.readouterr().out)["methods"]}
    assert list(methods) == list(QUANTIZATION_METHODS)
    assert methods["epmq"]["options"]["samples"]["default"] == 256
    assert methods["epmq"]["options"]["preset"]["default"] is None
    assert methods["epmq"]["summary"] == QUANTIZATION_METHODS["epmq"].summary
    assert "group_size" not in methods["epmq"]["options"]


def test_formats_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", "--list") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*FORMATS, *TARGETS))
    assert run("export", "--list", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    formats = {item["name"]: item for item in data["formats"]}
    targets = {item["name"]: item for item in data["targets"]}
    assert (list(formats), list(targets)) == (list(FORMATS), list(TARGETS))
    assert formats["qdq"]["file"] == "model_qdq.onnx"
    assert [formats[name]["low_bit"] for name in ("fp32", "qdq")] == [False, True]
    assert {name for name in formats if formats[name]["default"]} == {
        name for name, item in FORMATS.items() if item.default
    }
    marked = {line.split("│")[1].strip() for line in shown.splitlines() if "│ *" in line}
    assert marked == {name for name, item in FORMATS.items() if item.default}
    assert targets["cpu"]["formats"] == list(TARGETS["cpu"].formats)
    assert targets["cpu"]["why"] == TARGETS["cpu"].why


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["quantize"], "MERGED"),
        (["quantize", "merged"], "--output"),
        (["export"], "QUANTIZED"),
        (["export", "quantized"], "--output"),
        (["merge", "recipe.yaml"], "--output"),
    ],
)
def test_paths_are_needed_for_everything_else(
    arguments: list[str], missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    message = capsys.readouterr().err
    assert f"{missing}: required unless --list is given" in message
