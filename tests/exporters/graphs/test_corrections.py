"""Graphs with corrections for every task: against torch with dense weights ``Q + D_t``."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_zoo import SIZE, TinyZoo

from epmq_deploy.artifacts.manifest import read_manifest
from epmq_deploy.data.heads import load_heads
from epmq_deploy.errors import NumericsError
from epmq_deploy.exporters.formats import low_bit_format_names
from epmq_deploy.exporters.stage import export
from epmq_deploy.exporters.verification.codes import read_codes
from epmq_deploy.exporters.verification.corrections import verify_corrections
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.quantization.artifact import load_artifact
from epmq_deploy.quantization.residuals.artifact import load_residuals
from epmq_deploy.quantization.residuals.student import TaskStudents
from epmq_deploy.quantization.sequential import apply_quantized
from epmq_deploy.quantization.stage import quantize
from epmq_deploy.recipe import load_recipe, override
from epmq_deploy.runtime import load
from epmq_deploy.runtime.stage import evaluate

FORMATS = low_bit_format_names()
INT8 = "int8-expand"
IMAGES = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def work(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folders, with corrections of rank 3."""
    folder = tmp_path_factory.mktemp("corrections")
    recipe = override(load_recipe(tiny.recipe), "quantize", {"residual_rank": 3})
    recipe = override(recipe, "export", {"formats": list(FORMATS)})
    merge(recipe, folder / "merged")
    quantize(recipe, folder / "merged", folder / "quantized")
    export(recipe, folder / "quantized", folder / "exported")
    return folder


def torch_logits(work: Path) -> dict[str, np.ndarray]:
    """Each task's logits of the images, from a torch model of its own."""
    family, heads = family_of(work / "merged"), load_heads(work / "exported")
    model = family.load(work / "merged")
    apply_quantized(model, *load_artifact(work / "quantized"))
    students = TaskStudents(model, load_residuals(work / "quantized"))
    inputs = pixels(work)
    with torch.inference_mode():
        return {
            task: head(family.embed(students.become(task), *inputs)).numpy()
            for task, head in heads.items()
        }


def pixels(work: Path) -> tuple[torch.Tensor, ...]:
    family = family_of(work / "merged")
    return family.collate(work / "merged", [Image.fromarray(image) for image in IMAGES])


def session_of(work: Path, name: str) -> tuple[onnxruntime.InferenceSession, list[str]]:
    manifest = read_manifest(work / "exported", "export")
    (entry,) = (graph for graph in manifest.graphs if graph.format == name)
    options = onnxruntime.SessionOptions()
    for key, value in entry.session_options.items():
        options.add_session_config_entry(key, value)
    file = str(work / "exported" / entry.file)
    return onnxruntime.InferenceSession(file, options), list(entry.task_input)


@pytest.mark.parametrize("name", FORMATS)
def test_a_graph_gives_each_task_what_its_own_torch_model_gives(work: Path, name: str) -> None:
    session, tasks = session_of(work, name)
    (images,) = pixels(work)
    for task, expected in torch_logits(work).items():
        numbers = np.full(len(IMAGES), tasks.index(task))
        feed = {"pixel_values": images.numpy(), "task": numbers}
        (logits,) = session.run([f"logits_{task}"], feed)
        error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
        assert error < (0.1 if name == INT8 else 1e-4)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != INT8])
def test_mixed_tasks_give_what_separate_batches_give(work: Path, name: str) -> None:
    session, _ = session_of(work, name)
    (images,) = pixels(work)
    numbers = np.array([2, 0, 1, 0, 2])
    (mixed,) = session.run(["embedding"], {"pixel_values": images.numpy(), "task": numbers})
    for row, number in enumerate(numbers):
        feed = {"pixel_values": images[row : row + 1].numpy(), "task": np.array([number])}
        (alone,) = session.run(["embedding"], feed)
        np.testing.assert_allclose(mixed[row], alone[0], rtol=1e-4, atol=1e-5)


def test_only_low_bit_graphs_ask_for_the_task(work: Path) -> None:
    for graph in read_manifest(work / "exported", "export").graphs:
        model = onnx.load(str(work / "exported" / graph.file), load_external_data=False)
        inputs = [item.name for item in model.graph.input]
        assert inputs == ["pixel_values", *(["task"] if graph.low_bit else [])]
        assert bool(graph.task_input) == graph.low_bit
        assert all(node.domain in ("", "com.microsoft") for node in model.graph.node)


def test_factors_take_4_bits_and_codes_are_the_solvers(work: Path) -> None:
    layers, _ = load_artifact(work / "quantized")
    residuals = load_residuals(work / "quantized")
    for graph in read_manifest(work / "exported", "export").graphs:
        if not graph.low_bit:
            continue
        file = work / "exported" / graph.file
        verify_corrections(file, residuals)
        held = {item.name: item for item in onnx.load(str(file)).graph.initializer}
        for name in residuals.layers:
            assert held[f"{name}.correction.left"].data_type == onnx.TensorProto.INT4
        for name, layer in read_codes(file).items():
            assert layer.codes_sha256() == layers[name].codes_sha256()


def test_a_changed_factor_is_found(work: Path, tmp_path: Path) -> None:
    residuals = load_residuals(work / "quantized")
    graph = next(each for each in read_manifest(work / "exported", "export").graphs if each.low_bit)
    model = onnx.load(str(work / "exported" / graph.file))
    name = next(iter(residuals.layers))
    (left,) = (item for item in model.graph.initializer if item.name == f"{name}.correction.left")
    left.raw_data = bytes([left.raw_data[0] ^ 1, *left.raw_data[1:]])
    onnx.save(model, str(tmp_path / "changed.onnx"))
    with pytest.raises(NumericsError, match=name):
        verify_corrections(tmp_path / "changed.onnx", residuals)


def test_load_runs_each_task_with_its_corrections(work: Path) -> None:
    model = load(work / "exported", format="qdq")
    expected = torch_logits(work)
    together = model(list(IMAGES))
    for task, logits in expected.items():
        powers = np.exp(logits - logits.max(1, keepdims=True))
        shares = powers / powers.sum(1, keepdims=True)
        for alone, several, wanted in zip(
            model(list(IMAGES), tasks=[task]), together, shares, strict=True
        ):
            np.testing.assert_allclose(alone[task].scores, wanted, atol=1e-4)
            np.testing.assert_array_equal(alone[task].scores, several[task].scores)


def test_eval_scores_every_task_with_its_corrections(work: Path) -> None:
    recipe = read_manifest(work / "exported", "export").recipe
    recipe = override(recipe, "eval", {"diagnose": True, "diagnose_samples": 2})
    report = evaluate(recipe, work / "exported", overwrite=True)
    model = load(work / "exported", format="qdq")
    (row,) = (each for each in report.rows if each.name == "qdq")
    for task in model.tasks:
        source = recipe.tasks[task].evaluation
        assert source is not None
        rows = Dataset.from_parquet(str(source.path))
        answers = model([each["image"] for each in rows], tasks=[task])
        hits = [
            int(answer[task].scores.argmax()) == each["label"]
            for answer, each in zip(answers, rows, strict=True)
        ]
        assert row.accuracy[task] == pytest.approx(100 * sum(hits) / len(hits))


def test_rank_0_exports_the_same_files(tiny: TinyZoo, work: Path, tmp_path: Path) -> None:
    """Without corrections nothing is written that corrections add."""
    recipe = override(load_recipe(tiny.recipe), "export", {"formats": list(FORMATS)})
    digests = []
    for number, options in enumerate(({}, {"residual_rank": 0})):
        chosen = override(recipe, "quantize", options)
        quantize(chosen, work / "merged", tmp_path / f"quantized-{number}")
        export(chosen, tmp_path / f"quantized-{number}", tmp_path / f"exported-{number}")
        digests.append(
            {
                file.name: hashlib.sha256(file.read_bytes()).hexdigest()
                for file in (tmp_path / f"exported-{number}" / "onnx").iterdir()
            }
        )
        manifest = (tmp_path / f"exported-{number}" / "manifest.json").read_text()
        assert "task_input" not in manifest
    assert digests[0] == digests[1]
