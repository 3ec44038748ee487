"""The command line: results, exit codes, one clear sentence for bad input."""

import hashlib
import json
import shutil
from pathlib import Path

import onnxruntime
import pytest
import yaml
from command_line import run
from tiny_zoo import TASKS, TinyZoo

from epmq_deploy.exporters import read_codes
from epmq_deploy.exporters.formats import GraphFormat


@pytest.fixture(scope="module")
def chain(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the outputs of the four commands, run one after the other."""
    out = tmp_path_factory.mktemp("chain")
    assert run("merge", tiny.recipe, "-o", out / "merged", "--quiet") == 0
    assert run("quantize", out / "merged", "-o", out / "quantized", "--quiet") == 0
    assert run("export", out / "quantized", "-o", out / "onnx", "--quiet") == 0
    assert run("eval", out / "onnx", "--quiet") == 0
    return out


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


def test_the_manifest_identifies_the_codes(chain: Path) -> None:
    """One byte a code, row by row; the layers are those of every low-bit file."""
    details = json.loads((chain / "onnx" / "manifest.json").read_text())["details"]
    for graph in details["graphs"]:
        if graph["low_bit_nodes"]:
            stored = read_codes(chain / "onnx" / graph["file"])
            digests = {
                name: hashlib.sha256(bytes(layer.codes.flatten().tolist())).hexdigest()
                for name, layer in stored.items()
            }
            assert digests == details["codes"]


def test_the_manifest_holds_the_distance_from_torch(chain: Path) -> None:
    details = json.loads((chain / "onnx" / "manifest.json").read_text())["details"]
    assert (details["parity_inputs"], details["tasks_without_parity"]) == ("calibration", {})
    for graph in details["graphs"]:
        parity = graph["parity"]
        assert parity["samples"] == 4 * len(TASKS)
        assert 0 < parity["relative"] < 1e-4
        assert parity["agreement"] == 1


def test_a_graph_too_far_from_torch_ends_with_4(
    chain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(GraphFormat, "tolerance", 0.0)
    assert run("export", chain / "quantized", "-o", tmp_path / "onnx") == 4
    assert "model.onnx differs from torch" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_target_picks_formats_and_refuses_what_it_cannot_run(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, quantized = tmp_path / "onnx", chain / "quantized"
    assert run("export", quantized, "-o", out, "--target", "tensorrt") == 2
    message = capsys.readouterr().err
    assert "blocks of 16, it takes 64 or 128: quantize with --group-size 128" in message
    assert "--symmetric" in message
    assert not out.exists()
    assert run("export", quantized, "-o", out, "--target", "cuda", "-q") == 0
    details = json.loads((out / "manifest.json").read_text())["details"]
    assert [graph["format"] for graph in details["graphs"]] == ["fp32", "fp16", "matmulnbits"]
    assert details["target"]["name"] == "cuda"


def test_a_target_is_checked_before_any_work(
    tiny: TinyZoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = ["--set", "export.target=tensorrt"]
    assert run("run", tiny.recipe, "-o", tmp_path / "out", *setting) == 3
    assert "--group-size 128" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
        ({"tasks__red__head": {"classes": ["a", "b"]}}, 3, "its head has 2 classes"),
        (
            {"tasks__red__head": {"classes": ["class 1", "class 0", "Class_2"]}},
            3,
            "numbers its classes class 0, class 1, class 2; put tasks.red.head.classes",
        ),
        ({"tasks__red__head": {"matrix": "heads/none.safetensors"}}, 3, "none.safetensors"),
        (
            {"tasks__red__head": None, "quantize__distill": 1},
            3,
            "quantize.distill needs a head for every task (tasks.*.head); without: red",
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


def test_missed_gates_end_with_5_after_the_report(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = ["--max-drop", "-200", "--max-size", "0.001", "--max-latency-ratio", "0.001"]
    arguments = ["--no-experts", "--threads", "1,2", "--latency-batches", "2"]
    assert run("eval", chain / "onnx", "-o", tmp_path / "e.json", *gates, *arguments) == 5
    message = capsys.readouterr().err
    for format_ in ("matmulnbits", "qdq"):
        for found in ("lost", "takes", "has"):
            assert f"{format_} {found} " in message
    assert "fp32 lost" not in message
    assert {path.name for path in tmp_path.iterdir()} == {"e.json", "e.md", "e.html"}
    report = json.loads((tmp_path / "e.json").read_text())
    assert (len(report["misses"]), report["recommendation"]) == (6, None)
    timings = [(item["threads"], item["batch"]) for item in report["rows"][0]["timings"]]
    assert timings == [(1, 2), (2, 2)]
    assert run("eval", chain / "onnx", "-o", tmp_path / "f", "--max-drop", "200", "-q") == 0


def test_every_quantized_layer_is_diagnosed(chain: Path, tmp_path: Path) -> None:
    arguments = ["--diagnose", "--diagnose-samples", "2", "--no-experts", "-q"]
    assert run("eval", chain / "onnx", "-o", tmp_path / "e.json", *arguments) == 0
    report = json.loads((tmp_path / "e.json").read_text())
    quantized = {layer["layer"] for layer in report["layers"] if layer["bits"]}
    assert set(report["diagnoses"]) == {"matmulnbits", "qdq"}
    for found in report["diagnoses"].values():
        assert {noise["layer"] for noise in found["layers"]} | {*found["missing"]} == quantized
        assert found["missing"] == ["vision_model.embeddings.position_embedding"]
        assert found["samples"] == 2 * len(TASKS)
        assert all(5 < noise["own_db"] < 100 for noise in found["layers"])
    assert "Layers of qdq against fp32 merged" in (tmp_path / "e.html").read_text()


def test_a_provider_that_is_not_there_stops_before_any_work(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval", chain / "onnx", "-o", tmp_path / "e.json", "--provider", "npu") == 2
    assert "provider 'npu' is not in this onnxruntime" in capsys.readouterr().err
    assert not (tmp_path / "e.json").exists()


def test_damaged_artifact_is_not_exported(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(chain / "quantized", tmp_path / "quantized")
    file = tmp_path / "quantized" / "quantized.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    assert run("export", tmp_path / "quantized", "-o", tmp_path / "onnx") == 2
    assert "quantized.safetensors was changed" in capsys.readouterr().err


def test_run_skips_what_is_done_and_redoes_what_changed(tiny: TinyZoo, tmp_path: Path) -> None:
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
    changed = [*settings, "--set", "quantize.bits=8"]
    assert run("run", tiny.recipe, "-o", out, "-q", *changed) == 2
    assert stamps() == first
    assert run("run", tiny.recipe, "-o", out, "-q", "--overwrite", *changed) == 0
    second = stamps()
    assert second["merged/manifest.json"] == first["merged/manifest.json"]
    assert second["quantized/manifest.json"] != first["quantized/manifest.json"]
    assert second["exported/manifest.json"] != first["exported/manifest.json"]


@pytest.mark.parametrize("command", ["merge", "quantize", "export", "eval", "run", "demo"])
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"epmq {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["bits=3", "quantize.bits", "export.method=x", "quantize.method=[1]", "quantize.bits=["]
)
def test_malformed_assignments_are_usage_errors(
    tiny: TinyZoo, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert run("run", tiny.recipe, "-o", tmp_path / "out", "--set", text) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_eval_checks_its_output_before_any_work(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in (tmp_path, tmp_path / "none" / "eval.json"):
        assert run("eval", chain / "onnx", "-o", target) == 2
        assert "expected a file in an existing folder" in capsys.readouterr().err
    assert run("eval", chain / "onnx", "-o", tmp_path / "e.md") == 2
    assert "name the JSON file" in capsys.readouterr().err


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


def test_layers_in_int8_are_diagnosed_on_what_they_were_meant_to_read(
    chain: Path, tmp_path: Path
) -> None:
    """Smoothing divides inputs, and patches are multiplied instead of convolved."""
    out = tmp_path / "out"
    assert run("export", chain / "quantized", "-o", out, "--target", "cpu", "-q") == 0
    assert run("eval", out, "--diagnose", "--no-experts", "-q") == 0
    report = json.loads((out / "eval.json").read_text())
    own = {
        name: {noise["layer"]: noise["own_db"] for noise in found["layers"]}
        for name, found in report["diagnoses"].items()
    }
    in_int8, in_float = own["int8-expand"], own["matmulnbits"]
    assert in_int8.keys() == in_float.keys()
    assert len(in_int8) > 12
    blocks = [layer for layer in in_int8 if ".layers." in layer]
    # Rounding weights to 4 bits is the larger part of the noise.
    assert all(abs(in_int8[layer] - in_float[layer]) < 1 for layer in blocks)
