"""What is tuned towards the experts' predictions, on text-generation models."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from merged_text_generators import MergedTextGenerator, plain_divergence

from epmq_deploy.data.loading import load_samples
from epmq_deploy.merging.stage import merge
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.quantization.artifact import load_artifact
from epmq_deploy.quantization.context import CalibrationContext
from epmq_deploy.quantization.methods.epmq import PRESETS, EpmqOptions
from epmq_deploy.quantization.stage import calibration_samples, quantize
from epmq_deploy.recipe import override

two_kinds = pytest.mark.parametrize("merged_text_generator", ["flan-t5", "llama"], indirect=True)
tied_and_untied = pytest.mark.parametrize(
    "merged_text_generator", ["t5", "flan-t5", "qwen2"], indirect=True
)


@two_kinds
def test_the_anchor_is_searched_on_samples_held_back(
    merged_text_generator: MergedTextGenerator, tmp_path: Path
) -> None:
    recipe = override(merged_text_generator.recipe, "quantize", {"anchor": "auto"})
    manifest = quantize(recipe, merged_text_generator.folder, tmp_path / "auto")
    plan = manifest.reported["anchor"]
    curve, start = dict(plan["curve"]), PRESETS["outputs"].anchor
    assert len(curve) >= 3
    assert curve[plan["anchor"]] <= curve[start]
    number = override(merged_text_generator.recipe, "quantize", {"anchor": plan["anchor"]})
    given = quantize(number, merged_text_generator.folder, tmp_path / "number")
    assert given.outputs["quantized.safetensors"] == manifest.outputs["quantized.safetensors"]
    # The curve is that of models calibrated on the rest.
    family, folder = merged_text_generator.family, merged_text_generator.folder
    samples = calibration_samples(recipe, family, folder)
    held = {task: replace(one, indices=one.indices[:4]) for task, one in samples.items()}
    fitted = {task: replace(one, indices=one.indices[4:]) for task, one in samples.items()}
    device = torch.device("cpu")
    experts = ExpertBackbone(open_sources(recipe), device)
    ctx = CalibrationContext(family, folder, fitted, lambda: experts, device)
    assert isinstance(recipe.quantize, EpmqOptions)
    for strength in (start, plan["anchor"]):
        options = recipe.quantize.model_copy(update={"anchor": strength})
        model, _ = ctx.calibrate(options, rounding=False)
        expected = plain_divergence(merged_text_generator, held, model)
        assert curve[strength] == pytest.approx(expected, rel=1e-3)


@two_kinds
def test_the_scaling_is_searched(
    merged_text_generator: MergedTextGenerator, tmp_path: Path
) -> None:
    recipe = override(merged_text_generator.recipe, "merge", {"search": True, "search_samples": 8})
    manifest = merge(recipe, tmp_path / "merged")
    curve = {item["scaling"]: item["loss"] for item in manifest.reported["search"]}
    scaling = manifest.reported["scaling"]
    assert len(curve) >= 5
    assert curve[scaling] <= curve[0.3]
    family = merged_text_generator.family
    samples = {}
    for name, task in recipe.tasks.items():
        assert task.calibration is not None
        samples[name] = load_samples(name, task.calibration, family, prompt=task.prompt, limit=8)
    model = merged_text_generator.models.load(tmp_path / "merged")
    expected = plain_divergence(merged_text_generator, samples, model)
    assert curve[scaling] == pytest.approx(expected, rel=1e-3)


@tied_and_untied
def test_distillation_lowers_the_divergence_and_leaves_codes(
    merged_text_generator: MergedTextGenerator, tmp_path: Path
) -> None:
    plain, tuned = (
        override(merged_text_generator.recipe, "quantize", {"distill": epochs, "bits": 2})
        for epochs in (0, 2)
    )
    quantize(plain, merged_text_generator.folder, tmp_path / "plain")
    outcome = quantize(tuned, merged_text_generator.folder, tmp_path / "tuned").reported["distill"]
    assert outcome["kept"]
    assert outcome["after"] < outcome["before"]
    (before, _), (after, _) = (load_artifact(tmp_path / name) for name in ("plain", "tuned"))
    for name, linear in before.items():
        assert torch.equal(linear.codes, after[name].codes)
    moved = {
        name
        for name, linear in before.items()
        if not torch.equal(linear.scales, after[name].scales)
    }
    inside = {name for name in before if ".layer" in name or ".block" in name}
    tied = merged_text_generator.models.architecture.settings["tie_word_embeddings"]
    assert moved == inside | (set() if tied else {"lm_head"})


@tied_and_untied
def test_weights_of_text_generators_are_distilled_too(
    merged_text_generator: MergedTextGenerator, tmp_path: Path
) -> None:
    options = {"distill_weights": 2, "effort": "fast", "samples": 32}
    recipe = override(merged_text_generator.recipe, "quantize", options)
    quantize(recipe, merged_text_generator.folder, tmp_path / "out")
    layers, replaced = load_artifact(tmp_path / "out")
    tied = merged_text_generator.models.architecture.settings["tie_word_embeddings"]
    assert not tied or "lm_head" in layers
    assert replaced
    assert not {f"{name}.weight" for name in layers} & set(replaced)
