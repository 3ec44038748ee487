"""``epmq run``: wrong recipes, and what is skipped."""

import json
from pathlib import Path

import pytest
import yaml
from command_line import run
from safetensors.torch import load_file, save_file
from tiny_zoo import TinyZoo


def recipe_with(tiny: TinyZoo, target: Path, **changes: object) -> Path:
    """The tiny recipe with dotted keys changed, written beside links to its files."""
    content = yaml.safe_load(tiny.recipe.read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        section = content
        for part in path:
            section = section[part]
        section[last] = value
    for item in tiny.folder.iterdir():
        if item.is_dir():
            (target / item.name).symlink_to(item)
    file = target / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"quantize__bits": 5}, 2, "quantize.bits: Input should be 2, 3, 4 or 8, found 5"),
        ({"tasks__red__expert": "experts/none"}, 3, "expert 'red'"),
        ({"tasks__red__calibration": {"path": "x.parquet"}}, 3, "x.parquet: no such file"),
        (
            {"tasks__red__evaluation__label_column": "truth"},
            3,
            "has no column 'truth'; it has image, label",
        ),
        ({"export": {"formats": ["gguf"]}}, 3, "matmulnbits"),
        (
            {"tasks__red__head": {"classes": ["a", "b"]}},
            3,
            "the data: class 0, class 1, class 2; the head: a, b;",
        ),
        ({"tasks__red__head": {"matrix": "heads/none.safetensors"}}, 3, "none.safetensors"),
        (
            {"tasks__red__head": None, "quantize__distill": 1},
            3,
            "quantize.distill needs a head for every task (tasks.*.head); missing for red",
        ),
        ({"quantize__skip": ["*.fc9"]}, 3, "*.fc9 matches no layer"),
    ],
)
def test_wrong_recipes_stop_before_any_work(
    tiny: TinyZoo,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    code: int,
    message: str,
) -> None:
    recipe = recipe_with(tiny, tmp_path, **changes)
    assert run("run", recipe, "-o", tmp_path / "out") == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_wrong_models_and_wrong_data_come_in_one_message(
    tiny: TinyZoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "tasks__red__expert": "experts/none",
        "tasks__blue__calibration": {"path": "data/none.parquet"},
    }
    recipe = recipe_with(tiny, tmp_path, **changes)
    assert run("run", recipe, "-o", tmp_path / "out") == 3
    message = capsys.readouterr().err
    assert "2 problem(s)" in message
    assert "expert 'red'" in message
    assert "task 'blue'" in message


def test_a_target_is_checked_before_any_work(
    tiny: TinyZoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = ["--set", "export.target=tensorrt"]
    assert run("run", tiny.recipe, "-o", tmp_path / "out", *setting) == 3
    assert "--set quantize.group_size=128" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_run_skips_what_is_done_and_redoes_what_changed(
    tiny: TinyZoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def stamps() -> dict[str, int]:
        names = ("merged/manifest.json", "quantized/manifest.json", "exported/manifest.json")
        return {name: (out / name).stat().st_mtime_ns for name in names}

    settings = ["--set", "export.formats=[qdq]"]
    assert run("run", tiny.recipe, "-o", out, "-q", *settings) == 0
    first = stamps()
    assert run("run", tiny.recipe, "-o", out, "-q", *settings) == 0
    assert stamps() == first
    # Gates are held against what was measured, without measuring again.
    gate = [*settings, "--set", "eval.max_size=0.001"]
    assert run("run", tiny.recipe, "-o", out, "-q", *gate) == 5
    assert json.loads((out / "exported" / "eval.json").read_text())["misses"]
    assert stamps() == first
    (out / "exported" / "eval.json").write_text("{")
    assert run("run", tiny.recipe, "-o", out, *settings) == 2
    captured = capsys.readouterr()
    assert "eval.json is damaged" in " ".join(captured.err.split())
    assert run("run", tiny.recipe, "-o", out, "-q", "--overwrite", *settings) == 0
    assert json.loads((out / "exported" / "eval.json").read_text())["recommendation"]
    assert stamps() == first
    changed = [*settings, "--set", "quantize.bits=8"]
    assert run("run", tiny.recipe, "-o", out, "-q", *changed) == 2
    assert stamps() == first
    assert run("run", tiny.recipe, "-o", out, "-q", "--overwrite", *changed) == 0
    second = stamps()
    assert second["merged/manifest.json"] == first["merged/manifest.json"]
    assert second["quantized/manifest.json"] != first["quantized/manifest.json"]
    assert second["exported/manifest.json"] != first["exported/manifest.json"]


def test_a_changed_head_redoes_the_export_alone(tiny: TinyZoo, tmp_path: Path) -> None:
    recipe = recipe_with(tiny, tmp_path, tasks__red__head={"matrix": "own.safetensors"})
    head = load_file(tiny.folder / "heads" / "red.safetensors")
    save_file(head, tmp_path / "own.safetensors")
    out = tmp_path / "out"
    stages = ("merged", "quantized", "exported")

    def stamps() -> list[int]:
        files = [*(f"{stage}/manifest.json" for stage in stages), "exported/eval.json"]
        return [(out / file).stat().st_mtime_ns for file in files]

    settings = ["--set", "export.formats=qdq", "-q"]
    assert run("run", recipe, "-o", out, *settings) == 0
    first = stamps()
    # Where it lies does not matter.
    (tmp_path / "own.safetensors").rename(tmp_path / "moved.safetensors")
    recipe.write_text(recipe.read_text().replace("own.safetensors", "moved.safetensors"))
    assert run("run", recipe, "-o", out, *settings) == 0
    assert stamps()[:3] == first[:3]
    save_file({"head": -head["head"]}, tmp_path / "moved.safetensors")
    assert run("run", recipe, "-o", out, *settings) == 2
    assert run("run", recipe, "-o", out, *settings, "--overwrite") == 0
    second = stamps()
    assert [old == new for old, new in zip(first, second, strict=True)] == [
        True,
        True,
        False,
        False,
    ]
    heads = load_file(out / "exported" / "heads.safetensors")
    assert (heads["red.weight"] == -head["head"]).all()


@pytest.mark.parametrize(
    "text", ["bits=3", "quantize.bits", "export.method=x", "quantize.method=[1]", "quantize.bits=["]
)
def test_malformed_assignments_are_usage_errors(
    tiny: TinyZoo, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert run("run", tiny.recipe, "-o", tmp_path / "out", "--set", text) == 2
    assert capsys.readouterr().err.startswith("error: ")
