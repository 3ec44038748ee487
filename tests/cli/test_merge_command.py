"""``epmq merge``: the list of methods, and flags that reach them."""

import json
from pathlib import Path

import pytest
from command_line import run
from tiny_zoo import TinyZoo

from epmq_deploy.merging.methods import MERGE_METHODS


def test_list_explains_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", "--list") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in MERGE_METHODS)
    assert run("merge", "--list", "--json") == 0
    found = {item["name"]: item for item in json.loads(capsys.readouterr().out)["methods"]}
    assert set(found) == set(MERGE_METHODS)
    assert found["ties"]["source"] == "TIES-Merging, arXiv 2306.01708"
    assert found["ties"]["options"]["density"]["default"] == 0.2
    assert "dtype" not in found["ties"]["options"]


def test_merging_needs_an_output(tiny: TinyZoo, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", tiny.recipe) == 2
    assert "--output" in capsys.readouterr().err


def test_flags_reach_the_method(tiny: TinyZoo, tmp_path: Path) -> None:
    flags = ["--method", "average", "--weights", "red=1,green=2", "--weights", "blue=0.5"]
    assert run("merge", tiny.recipe, "-o", tmp_path / "m", "-q", *flags) == 0
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert manifest["recipe"]["merge"]["weights"] == {"red": 1.0, "green": 2.0, "blue": 0.5}


def test_search_prints_its_curve(tiny: TinyZoo, tmp_path: Path, capfd: object) -> None:
    assert isinstance(capfd, pytest.CaptureFixture)
    flags = ["--search", "--search-samples", "4", "--json", "-q"]
    assert run("merge", tiny.recipe, "-o", tmp_path / "m", *flags) == 0
    details = json.loads(capfd.readouterr().out)
    assert details["scaling"] in {item["scaling"] for item in details["search"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "slerp"], "slerp merges exactly two experts, the recipe has 3"),
        (["--weights", "red=1"], "merge.weights lacks blue, green"),
        (["--layers", "*.nothing:scaling=1"], "merge.layers: *.nothing matches no tensor"),
    ],
)
def test_options_that_do_not_fit_end_with_one_sentence(
    tiny: TinyZoo,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert run("merge", tiny.recipe, "-o", tmp_path / "m", *flags) == 2
    found = capsys.readouterr().err.strip()
    assert found.startswith(f"error: {message}")
    assert "\n" not in found
    assert not (tmp_path / "m").exists()
