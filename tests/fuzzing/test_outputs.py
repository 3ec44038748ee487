"""What stages write, with odd values in it: manifests, reports, and what an application opens."""

import json
from pathlib import Path

import pytest
from fuzzing import cases, changed_copy, succeeds_or_explains
from hypothesis import given
from hypothesis import strategies as st
from mutations import broken_json, damaged
from tiny_zoo import TinyZoo

from epmq_deploy.artifacts.manifest import Stage, read_manifest
from epmq_deploy.artifacts.outputs import is_done, open_output
from epmq_deploy.pipeline import run
from epmq_deploy.recipe import load_recipe, override
from epmq_deploy.runtime.inference.load import load
from epmq_deploy.runtime.report.json_report import read_report

STAGES: dict[str, Stage] = {"merged": "merge", "quantized": "quantize", "exported": "export"}


@pytest.fixture(scope="module")
def outputs(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a whole run."""
    recipe = override(load_recipe(tiny.recipe), "export", {"formats": ["matmulnbits"]})
    recipe = override(recipe, "eval", {"latency_runs": 1})
    run(recipe, tmp_path_factory.mktemp("outputs") / "out")
    return tmp_path_factory.getbasetemp() / "outputs0" / "out"


@pytest.mark.parametrize("name", STAGES)
@cases(500)
@given(data=st.data())
def test_manifests_with_odd_values(outputs: Path, name: str, data: st.DataObject) -> None:
    manifest = json.loads((outputs / name / "manifest.json").read_text())
    folder = outputs.parent / f"only-{name}"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(data.draw(broken_json(manifest)))
    succeeds_or_explains(lambda: read_manifest(folder, STAGES[name]))
    succeeds_or_explains(lambda: open_output(folder, STAGES[name]))
    succeeds_or_explains(lambda: is_done(folder, STAGES[name], "x"))


@cases(500)
@given(data=st.data())
def test_reports_with_odd_values(outputs: Path, data: st.DataObject) -> None:
    report = json.loads((outputs / "exported" / "eval.json").read_text())
    file = outputs.parent / "eval.json"
    file.write_bytes(data.draw(broken_json(report)))
    succeeds_or_explains(lambda: read_report(file))


@pytest.mark.parametrize(
    "name", ["manifest.json", "eval.json", "config.json", "preprocessor_config.json"]
)
@cases(50)
@given(data=st.data())
def test_exports_with_odd_values_are_opened_or_refused(
    outputs: Path, name: str, data: st.DataObject
) -> None:
    exported = outputs / "exported"
    content = data.draw(broken_json(json.loads((exported / name).read_text())))
    with changed_copy(exported, Path(name), content) as copy:
        succeeds_or_explains(lambda: load(copy))


@pytest.mark.parametrize("pattern", ["heads.safetensors", "onnx/model_*.onnx"])
@cases(40)
@given(data=st.data())
def test_damaged_exports_are_opened_or_refused(
    outputs: Path, pattern: str, data: st.DataObject
) -> None:
    exported = outputs / "exported"
    (file,) = exported.glob(pattern)
    content = data.draw(damaged(file.read_bytes()))
    with changed_copy(exported, file.relative_to(exported), content) as copy:
        succeeds_or_explains(lambda: load(copy))
