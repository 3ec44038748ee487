"""Graphs are compared with torch on real samples; one that is too far off is an error."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_zoo import TASKS, TinyZoo

from epmq_deploy.errors import NumericsError
from epmq_deploy.exporters.verification.parity import measure_parity, parity_inputs, torch_outputs
from epmq_deploy.models import family_of
from epmq_deploy.recipe import load_recipe


@pytest.mark.parametrize("fmt", ["fp32", "fp16", "matmulnbits", "qdq"])
def test_distances_are_those_of_the_outputs(
    exported: Any, tools: types.SimpleNamespace, fmt: str
) -> None:
    case = exported.case
    model = case.model if fmt in ("fp32", "fp16") else tools.dequantized_model(case)
    inputs = [(torch.randn(2, 3, 16, 16),), (torch.randn(1, 3, 16, 16),)]
    expected = torch_outputs(model, inputs)
    graph = exported.graphs[fmt]
    parity = measure_parity(graph, expected, inputs, 0)
    runs = [tools.run(graph.path, *batch) for batch in inputs]
    joined = [torch.cat([torch.from_numpy(run[index]) for run in runs]) for index in range(3)]
    torches = [torch.cat([outputs[index] for outputs in expected]) for index in range(3)]
    distances = [(ours - theirs) for ours, theirs in zip(joined, torches, strict=True)]
    assert parity.samples == 3
    assert parity.max_abs == pytest.approx(max(float(d.abs().max()) for d in distances))
    norms = [float(d.norm() / theirs.norm()) for d, theirs in zip(distances, torches, strict=True)]
    assert parity.relative == pytest.approx(max(norms), rel=1e-3)
    assert parity.relative <= (5e-3 if fmt == "fp16" else 1e-5)
    assert parity.agreement == 1


def test_another_model_is_found(exported: Any, tools: types.SimpleNamespace) -> None:
    inputs = [(exported.case.images,)]
    expected = torch_outputs(exported.case.model, inputs)
    with pytest.raises(
        NumericsError, match=r"model_qdq\.onnx differs from torch by .* allows 0.00"
    ):
        measure_parity(exported.graphs["qdq"], expected, inputs, 0)


def test_not_a_number_is_no_parity(exported: Any) -> None:
    inputs = [(torch.full((2, 3, 16, 16), torch.nan),)]
    expected = torch_outputs(exported.case.model, inputs)
    with pytest.raises(NumericsError, match="differs from torch by nan"):
        measure_parity(exported.graphs["fp32"], expected, inputs, 0)


def test_samples_are_the_tasks_own(tiny: TinyZoo) -> None:
    recipe, family = load_recipe(tiny.recipe), family_of(tiny.base)
    example = family.example_inputs(tiny.base, 2)
    found = parity_inputs(recipe.tasks, family, tiny.base, example)
    assert (found.kind, found.missing) == ("calibration", {})
    assert [batch[0].shape for batch in found.batches] == [(4, 3, 16, 16)] * len(TASKS)
    assert not torch.equal(found.batches[0][0], found.batches[1][0])


def test_example_inputs_are_the_last_resort(
    tiny: TinyZoo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, family = load_recipe(tiny.recipe), family_of(tiny.base)
    example = family.example_inputs(tiny.base, 2)
    red, *others = recipe.tasks
    gone = recipe.tasks[red].calibration.model_copy(update={"path": str(tmp_path / "gone.parquet")})
    tasks = dict(recipe.tasks)
    tasks[red] = tasks[red].model_copy(update={"calibration": gone})
    some = parity_inputs(tasks, family, tiny.base, example)
    assert (some.kind, list(some.missing), len(some.batches)) == ("calibration", [red], 2)
    assert not caplog.records
    for task in others:
        tasks[task] = tasks[task].model_copy(update={"calibration": None})
    none = parity_inputs(tasks, family, tiny.base, example)
    assert (none.kind, none.batches) == ("example", [example])
    assert "no such file or folder" in none.missing[red]
    assert "random inputs are used" in caplog.text


def test_int8_arithmetic_has_a_tolerance_of_its_own(
    tools: types.SimpleNamespace, tmp_path: Path
) -> None:
    case = tools.make_case(lambda name, weight: (4, 32, True))
    _, graph = tools.export(case, ["matmulnbits"], tmp_path, accuracy_level=4)
    inputs = [(case.images,)]
    expected = torch_outputs(tools.dequantized_model(case), inputs)
    assert 1e-3 < measure_parity(graph, expected, inputs, 4).relative < 0.1
    with pytest.raises(NumericsError):
        measure_parity(graph, expected, inputs, 0)
    other = torch_outputs(case.model, inputs)  # lacks the replaced bias and norm
    with pytest.raises(NumericsError):
        measure_parity(graph, other, inputs, 4)
