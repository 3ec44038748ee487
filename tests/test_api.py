"""The Python API: the snippet of the README, and what importing and calling it leaves alone."""

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from command_line import run as epmq_command
from tiny_zoo import TASKS, TinyZoo

import epmq_deploy as epmq

STAGES = {"merged": "model.safetensors", "quantized": "quantized.safetensors"}


def process_state() -> dict[str, object]:
    """What a library must not change for the process it is called in."""
    return {
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "log": [list(logging.getLogger(name).handlers) for name in ("", "epmq_deploy")],
        "log levels": [logging.getLogger(name).level for name in ("", "epmq_deploy")],
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "folder": Path.cwd(),
    }


@pytest.fixture(scope="module")
def chain(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the snippet."""
    out = str(tmp_path_factory.mktemp("api") / "out")
    before = process_state()
    recipe = epmq.load_recipe(str(tiny.recipe))
    merged = epmq.merge(recipe, f"{out}/merged")
    quantized = epmq.quantize(merged, f"{out}/quantized", bits=4)
    exported = epmq.export(quantized, f"{out}/exported", target="cpu")
    report = epmq.evaluate(exported)
    model = epmq.load(f"{out}/exported")
    assert process_state() == before
    assert merged.folder == Path(out) / "merged"
    assert merged.manifest.details.method == recipe.merge.method
    assert {graph.format for graph in exported.manifest.graphs} >= {"fp32", "int8-expand"}
    assert set(report.samples) == set(TASKS)
    image = torch.zeros(16, 16, 3, dtype=torch.uint8).numpy()
    assert set(model.predict(image)) == set(model(image)) == set(TASKS)
    (first, second) = model.predict_batch([image, image], tasks=["red"])
    assert first["red"].label == second["red"].label == model.predict(image)["red"].label
    return Path(out)


def test_evaluate_writes_what_the_command_writes(chain: Path) -> None:
    exported = chain / "exported"
    assert json.loads((exported / "eval.json").read_text())["recommendation"]
    assert (exported / "eval.md").read_text().startswith("|")
    assert "<html" in (exported / "report.html").read_text()
    assert "Not evaluated yet" not in (exported / "README.md").read_text()


def test_it_computes_what_the_command_line_computes(
    chain: Path, tiny: TinyZoo, tmp_path: Path
) -> None:
    assert epmq_command("merge", tiny.recipe, "-o", tmp_path / "merged", "-q") == 0
    assert epmq_command("quantize", tmp_path / "merged", "-o", tmp_path / "quantized", "-q") == 0
    for stage, file in STAGES.items():
        assert (chain / stage / file).read_bytes() == (tmp_path / stage / file).read_bytes()


def test_run_skips_what_the_stages_wrote(
    chain: Path, tiny: TinyZoo, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = epmq.load_recipe(tiny.recipe)
    recipe = recipe.model_copy(
        update={"export": recipe.export.model_copy(update={"target": "cpu"})}
    )
    with caplog.at_level(logging.INFO, "epmq_deploy"):
        report = epmq.run(recipe, chain)
    assert sum("skipped" in record.message for record in caplog.records) == 4
    assert isinstance(report, epmq.EvalReport)


def test_a_wrong_option_is_one_sentence(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(
        epmq.RecipeError, match=r"bitz: no such option; allowed here: .*bits.*; did you mean bits\?"
    ):
        epmq.quantize(chain / "merged", tmp_path / "out", bitz=4)
    with pytest.raises(epmq.RecipeError, match="already exists; choose another output"):
        epmq.quantize(chain / "merged", chain / "quantized")
    assert not (tmp_path / "out").exists()


def test_gates_are_for_the_caller_to_hold(chain: Path, tmp_path: Path) -> None:
    report = epmq.evaluate(chain / "exported", tmp_path / "e.json", max_size=1e-6, max_samples=2)
    with pytest.raises(epmq.GateError, match=r"eval\.max_size"):
        epmq.check_gates(report)


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = ("torch", "onnxruntime", "onnx", "transformers", "pydantic", "numpy")
    code = f"import sys, epmq_deploy; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_name_can_be_used() -> None:
    assert set(dir(epmq)) == set(epmq.__all__)
    for name in epmq.__all__:
        assert getattr(epmq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = epmq.nothing


def test_sessions_alone_load_no_torch() -> None:
    code = "import sys, epmq_deploy.runtime.ort; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_former_names_of_exported_models_still_work() -> None:
    from epmq_deploy import runtime

    assert runtime.DeployedModel is runtime.ExportedModel
    assert runtime.DeployedWriter is runtime.ExportedTextGenerator
