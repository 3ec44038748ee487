"""The command line: results, exit codes, one clear sentence for bad input."""

import json
import shutil
from pathlib import Path

import onnxruntime
import pytest
from command_line import run
from tiny_zoo import TASKS, TinyZoo


def test_the_four_commands_leave_what_users_expect(chain: Path) -> None:
    out = chain / "onnx"
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        "config.json",
        "preprocessor_config.json",
        "heads.safetensors",
        "manifest.json",
        "README.md",
        "onnx/model.onnx",
        "onnx/model_q4.onnx",
        "onnx/model_qdq.onnx",
        "report.json",
        "eval.json",
        "eval.md",
        "report.html",
    }
    card = (out / "README.md").read_text()
    assert (out / "eval.md").read_text() in card
    report = json.loads((chain / "onnx" / "eval.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["experts", "fp32", "matmulnbits", "qdq"]
    assert report["samples"] == dict.fromkeys(TASKS, 15)
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["matmulnbits"]["accuracy"] == rows["qdq"]["accuracy"]
    assert rows["fp32"]["drop"] == 0
    assert [timing["batch"] for timing in rows["qdq"]["timings"]] == [1, 8]
    assert rows["qdq"]["footprint"]["load_ms"] > 0
    assert report["recommendation"]["format"] in ("matmulnbits", "qdq")
    session = onnxruntime.InferenceSession(chain / "onnx" / "onnx" / "model_qdq.onnx")
    assert [item.name for item in session.get_outputs()] == [
        "embedding",
        *(f"logits_{task}" for task in sorted(TASKS)),
    ]


def test_json_goes_to_stdout_alone(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quantize", chain / "merged", "-o", tmp_path / "q", "--json", "--method", "rtn") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["layers"] == 15
    assert result["status"] == {"solved": 15}


def test_quiet_prints_nothing(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quantize", chain / "merged", "-o", tmp_path / "q", "-q", "--method", "rtn") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_every_command_prints_one_object_as_json_and_nothing_when_quiet(
    tiny: TinyZoo, tmp_path: Path, capfd: object
) -> None:
    """Whatever libraries print below Python is seen as well."""
    assert isinstance(capfd, pytest.CaptureFixture)
    for how in ("--json", "-q"):
        out = tmp_path / how
        for arguments, first in (
            (("merge", tiny.recipe, "-o", out / "m"), "output"),
            (("quantize", out / "m", "-o", out / "q", "--method", "rtn"), "output"),
            (("export", out / "q", "-o", out / "x", "--format", "qdq"), "output"),
            (("eval", out / "x"), "rows"),
            (("eval", out / "x", "--overwrite", "--max-size", "0.001"), "rows"),
        ):
            code = run(*arguments, how)
            shown = capfd.readouterr()
            assert code == (5 if "--max-size" in arguments else 0)
            if how == "--json":
                assert next(iter(json.loads(shown.out))) == first
            else:
                assert shown.out == ""
                missed = "error: gates missed: qdq takes 0." if code else ""
                assert shown.err.startswith(missed)
                assert shown.err.count("\n") == bool(code)


def test_flags_alone_merge_without_a_recipe(tiny: TinyZoo, tmp_path: Path) -> None:
    experts = [f"--expert={task}={tiny.expert(task)}" for task in TASKS]
    flags = ["--method", "ties", "--density", "0.5", "-q"]
    assert run("merge", "--base", tiny.base, *experts, *flags, "-o", tmp_path / "merged") == 0
    manifest = json.loads((tmp_path / "merged" / "manifest.json").read_text())
    assert manifest["recipe"]["merge"]["density"] == 0.5
    # Without calibration data, only methods that need none can go on.
    assert run("quantize", tmp_path / "merged", "-o", tmp_path / "q", "--method", "rtn", "-q") == 0


def test_guided_quantization_without_data_says_what_is_missing(
    tiny: TinyZoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expert = f"red={tiny.expert('red')}"
    run("merge", "--base", tiny.base, "--expert", expert, "-o", tmp_path / "merged", "-q")
    assert run("quantize", tmp_path / "merged", "-o", tmp_path / "q") == 3
    assert "task 'red' has no calibration data" in capsys.readouterr().err
    # The recipe's tasks can be handed in later.
    arguments = ["quantize", tmp_path / "merged", "-o", tmp_path / "q", "--recipe", tiny.recipe]
    assert run(*arguments) == 3
    assert "expert 'blue' is not part of the merged model" in capsys.readouterr().err


def test_existing_output_needs_overwrite(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, source, target in (
        ("quantize", "merged", "quantized"),
        ("export", "quantized", "onnx"),
    ):
        assert run(command, chain / source, "-o", chain / target) == 2
        assert "--overwrite" in capsys.readouterr().err
    assert run("eval", chain / "onnx") == 2
    assert "--overwrite" in capsys.readouterr().err


def test_wrong_folder_is_named(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", chain / "merged", "-o", chain / "x") == 2
    assert "is the output of `epmq merge`" in capsys.readouterr().err


def test_unknown_flag_and_bad_value_are_usage_errors(chain: Path, tmp_path: Path) -> None:
    assert run("quantize", chain / "merged", "-o", tmp_path / "q", "--wrong") == 2
    assert run("quantize", chain / "merged", "-o", tmp_path / "q", "--bits", "5") == 2
    assert run("quantize", chain / "merged", "-o", tmp_path / "q", "--method", "magic") == 2
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("command", ["merge", "quantize", "export", "eval", "run", "demo"])
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"epmq {command} " in capsys.readouterr().out


def test_an_expert_changed_after_the_merge_is_noticed(
    tiny: TinyZoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny.folder, tmp_path / "zoo")
    run("merge", tmp_path / "zoo" / "recipe.yaml", "-o", tmp_path / "merged", "-q")
    file = tmp_path / "zoo" / "experts" / "red" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run("quantize", tmp_path / "merged", "-o", tmp_path / "q") == 3
    assert "expert 'red' was changed since it was merged" in capsys.readouterr().err
