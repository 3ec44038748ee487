"""Corrections in the quantize stage: files, manifest, resuming, and what they gain."""

import hashlib
from pathlib import Path

import pytest
import torch
from interrupted import killed_in
from tiny_zoo import TASKS, TinyZoo
from torch import nn

from epmq_deploy.artifacts.manifest import read_manifest
from epmq_deploy.calibration.block_runner import SameForAllTasks
from epmq_deploy.data.samples import batches
from epmq_deploy.errors import EpmqError, RecipeError
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import MODEL_FAMILIES, family_of
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.quantization.artifact import load_artifact
from epmq_deploy.quantization.residuals.artifact import RESIDUALS_FILE, load_residuals
from epmq_deploy.quantization.residuals.layers import uncorrectable
from epmq_deploy.quantization.residuals.per_sample import BatchTasks, corrected
from epmq_deploy.quantization.residuals.student import TaskStudents
from epmq_deploy.quantization.sequential import apply_quantized
from epmq_deploy.quantization.stage import calibration_samples, check_residuals, quantize
from epmq_deploy.recipe import Recipe, load_recipe, override

RANK = 4


@pytest.fixture(scope="module")
def recipe(tiny: TinyZoo) -> Recipe:
    return override(load_recipe(tiny.recipe), "quantize", {"residual_rank": RANK})


@pytest.fixture(scope="module")
def merged(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge") / "merged"
    merge(recipe, folder)
    return folder


@pytest.fixture(scope="module")
def quantized(recipe: Recipe, merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "quantized"
    quantize(recipe, merged, folder)
    return folder


def student(merged: Path, quantized: Path) -> nn.Module:
    """The merged model with what all tasks share."""
    model = family_of(merged).load(merged)
    apply_quantized(model, *load_artifact(quantized))
    return model


def contents(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.glob("*.safetensors")
    }


def test_rank_0_writes_what_was_written_without_the_option(
    tiny: TinyZoo, merged: Path, tmp_path: Path
) -> None:
    plain = load_recipe(tiny.recipe)
    first = quantize(plain, merged, tmp_path / "first")
    second = quantize(
        override(plain, "quantize", {"residual_rank": 0}), merged, tmp_path / "second"
    )
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert RESIDUALS_FILE not in contents(tmp_path / "first")
    assert "residual_rank" not in plain.quantize.deciding
    assert first.fingerprint == second.fingerprint
    assert first.details.residuals is None


def test_the_manifest_says_what_corrections_take(quantized: Path) -> None:
    residuals = load_residuals(quantized)
    details = read_manifest(quantized, "quantize").details.residuals
    assert details is not None
    assert set(residuals.tasks) == set(TASKS)
    assert (details.rank, details.layers) == (RANK, len(residuals.layers))
    assert details.bytes == residuals.packed_bytes and 0 < details.share < 1
    assert details.without == {}


def test_every_task_comes_closer_to_its_expert(
    recipe: Recipe, merged: Path, quantized: Path
) -> None:
    family = family_of(merged)
    experts = ExpertBackbone(open_sources(recipe), torch.device("cpu"))
    model = student(merged, quantized)
    students = TaskStudents(model, load_residuals(quantized))
    for task, samples in calibration_samples(recipe, family, merged).items():
        (inputs,) = batches(samples, family, merged, 24)
        with torch.inference_mode():
            wanted = family.embed(experts.become(task), *inputs)
            students.share()
            shared = family.embed(model, *inputs)
            own = family.embed(students.become(task), *inputs)
        assert (own - wanted).norm() < 0.9 * (shared - wanted).norm()


def test_shared_weights_are_back_after_tasks_ran(merged: Path, quantized: Path) -> None:
    model = student(merged, quantized)
    before = {name: value.clone() for name, value in model.named_parameters()}
    students = TaskStudents(model, load_residuals(quantized))
    students.become("red")
    block = next(name for name in before if "layers.1" in name).partition(".self_attn")[0]
    students.module("blue", block.rpartition(".layers.")[0] + ".layers.1")
    students.share()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name


def test_mixed_batches_give_each_sample_what_its_task_alone_gives(
    merged: Path, quantized: Path
) -> None:
    """Per-sample corrections against dense weights ``Q + D_t``."""
    family = family_of(merged)
    residuals = load_residuals(quantized)
    inputs = family.example_inputs(merged, 5)
    numbers = torch.tensor([2, 0, 1, 0, 2])
    model = student(merged, quantized)
    with corrected(model, residuals, BatchTasks(numbers)), torch.inference_mode():
        mixed = family.embed(model, *inputs)
    students = TaskStudents(model, residuals)
    for row, number in enumerate(numbers.tolist()):
        with torch.inference_mode():
            alone = family.embed(
                students.become(residuals.tasks[number]), *(part[row : row + 1] for part in inputs)
            )
        torch.testing.assert_close(mixed[row], alone[0], rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_ends_with_the_same_corrections(
    recipe: Recipe,
    merged: Path,
    quantized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed_in(1, recipe, merged, tmp_path / "resumed", monkeypatch)
    quantize(recipe, merged, tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(quantized)


def test_task_vectors_are_enough(tiny: TinyZoo, merged: Path, tmp_path: Path) -> None:
    plain = load_recipe(tiny.recipe)
    chosen = plain.model_copy(
        update={
            "quantize": type(plain.quantize)(preset="weights", group_size=16, residual_rank=2)  # type: ignore[call-arg]
        }
    )
    quantize(chosen, merged, tmp_path / "quantized")
    residuals = load_residuals(tmp_path / "quantized")
    assert set(residuals.tasks) == set(TASKS) and len(residuals.layers) == 12
    # Each moves the weights towards its expert's.
    experts = ExpertBackbone(open_sources(plain), torch.device("cpu"))
    layers, _ = load_artifact(tmp_path / "quantized")
    for name, layer in residuals.layers.items():
        for number, task in enumerate(residuals.tasks):
            gap = experts.tensor(task, f"{name}.weight") - layers[name].dequantize()
            assert (gap - layer.weight(number)).norm() < gap.norm()


def test_layers_that_mix_samples_or_run_several_times_are_named() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("once", "twice", "windows", "never")})

    def run() -> None:
        x = torch.randn(3, 2, 4)
        y = model["once"](x)
        model["twice"](model["twice"](y))
        model["windows"](x.reshape(6, 1, 4))

    reasons = uncorrectable(model, list(model), run, 3)
    assert reasons.keys() == {"twice", "windows", "never"}
    assert reasons["twice"] == "it runs 2 times"


def test_distillation_and_other_methods_are_refused(tiny: TinyZoo) -> None:
    recipe = load_recipe(tiny.recipe)
    with pytest.raises(EpmqError, match="residual_rank"):
        override(recipe, "quantize", {"residual_rank": 1, "distill": 1})
    with pytest.raises(EpmqError, match="residual_rank"):
        override(recipe, "quantize", {"method": "gptq", "residual_rank": 1})


def test_models_that_generate_text_are_refused(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="generates text"):
        check_residuals(recipe.quantize, MODEL_FAMILIES.named("t5"))


def test_without_corrections_all_tasks_share_one_model() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    assert TaskStudents(model).become("x") is SameForAllTasks(model).become("x")
