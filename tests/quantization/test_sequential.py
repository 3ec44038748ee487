"""Quantizing a whole model, block by block."""

from functools import partial
from pathlib import Path

import pytest
import torch
from one_expert import OneExpert
from tiny_zoo import TASKS, TinyZoo
from torch import Tensor, nn

from epmq_deploy.artifacts.manifest import read_manifest
from epmq_deploy.calibration.activations import advance, capture_block_batches
from epmq_deploy.calibration.cache import ActivationCache
from epmq_deploy.calibration.statistics import Accumulator
from epmq_deploy.data.samples import batches
from epmq_deploy.errors import MismatchError, NumericsError, RecipeError
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.quantization import embeddings
from epmq_deploy.quantization.artifact import load_artifact
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.results import QuantizedModel
from epmq_deploy.quantization.sequential import apply_quantized, quantize_model
from epmq_deploy.quantization.stage import calibration_samples, quantize
from epmq_deploy.recipe import Recipe, load_recipe, override

OUTER = (
    "vision_model.embeddings.patch_embedding",
    "vision_model.embeddings.position_embedding",
    "visual_projection",
)


@pytest.fixture(scope="module")
def merged(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merge the tiny zoo."""
    folder = tmp_path_factory.mktemp("merge") / "merged"
    merge(load_recipe(tiny.recipe), folder)
    return folder


def quantized(recipe: Recipe, folder: Path, **options: object) -> tuple[nn.Module, QuantizedModel]:
    """Quantize in memory; the model with dequantized weights, and the result."""
    recipe = override(recipe, "quantize", options)
    family = family_of(folder)
    samples = calibration_samples(recipe, family, folder)
    model = family.load(folder)
    size = recipe.quantize.model_dump().get("batch_size", 1)
    result = quantize_model(
        model,
        family,
        QUANTIZATION_METHODS[recipe.quantize.method],
        recipe.quantize,
        batches={
            name: partial(batches, chosen, family, folder, size) for name, chosen in samples.items()
        },
        experts=ExpertBackbone(open_sources(recipe), torch.device("cpu")),
    )
    return model, result


def features(folder: Path, model: nn.Module, recipe: Recipe) -> Tensor:
    """Embeddings of one task's calibration samples."""
    family = family_of(folder)
    samples = calibration_samples(recipe, family, folder)[TASKS[0]]
    (inputs,) = batches(samples, family, folder, 100)
    with torch.inference_mode():
        return family.embed(model, *inputs)


@pytest.mark.parametrize("method", sorted(QUANTIZATION_METHODS))
def test_every_linear_layer_of_the_blocks_is_quantized(
    tiny: TinyZoo, merged: Path, method: str
) -> None:
    recipe = load_recipe(tiny.recipe)
    _, result = quantized(recipe, merged, method=method, group_size=16)
    family = family_of(merged)
    expected = {name for block in family.blocks(family.load(merged)) for name in block.layers}
    assert len(expected) == 12
    outside = {name for name in result.layers if name not in expected}
    assert outside == set(OUTER)
    assert expected <= set(result.layers)
    reported = {report.layer: report for report in result.reports}
    assert all(reported[name].status == "solved" for name in expected)
    assert all(reported[name].bits == (8 if name in OUTER else 4) for name in result.layers)
    assert not any(report.status == "kept" for report in result.reports)


def test_what_is_outside_the_blocks_is_rounded_where_it_is_worth_it(
    tiny: TinyZoo, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tiny.recipe)
    model, result = quantized(recipe, merged, method="rtn")
    original = family_of(merged).load(merged)
    for name in OUTER:
        weight = original.get_parameter(f"{name}.weight")
        rounded = model.get_parameter(f"{name}.weight")
        assert rounded.shape == weight.shape
        assert torch.equal(result.layers[name].dequantize().reshape(weight.shape), rounded)
        assert 0 < (rounded - weight).norm() < 0.01 * weight.norm()
    tables = [result.layers[name] for name in OUTER if name != "visual_projection"]
    assert all(item.scales.shape[1] == 1 and item.symmetric for item in tables)

    def kept(**options: object) -> dict[str, str]:
        _, result = quantized(recipe, merged, method="rtn", **options)
        reports = {report.layer: report for report in result.reports if report.status == "kept"}
        assert not set(reports) & set(result.layers)
        return {name: report.reason for name, report in reports.items()}

    assert kept(outer=False) == dict.fromkeys(OUTER, "outside the blocks")
    assert kept(skip=("visual_projection",)) == {"visual_projection": "skipped by option"}
    monkeypatch.setattr(embeddings, "_WORTH", 0.02)
    reasons = kept()
    assert set(reasons) == {"vision_model.embeddings.position_embedding"}
    assert "of the weights" in reasons["vision_model.embeddings.position_embedding"]


def test_model_ends_with_the_artifact_s_weights(tiny: TinyZoo, merged: Path) -> None:
    recipe = load_recipe(tiny.recipe)
    model, result = quantized(recipe, merged)
    fresh = family_of(merged).load(merged)
    apply_quantized(fresh, result.layers, result.replaced)
    assert torch.equal(features(merged, model, recipe), features(merged, fresh, recipe))
    original = family_of(merged).load(merged)
    assert not torch.equal(features(merged, original, recipe), features(merged, fresh, recipe))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_keeps_features_closer_than_rounding(tiny: TinyZoo, merged: Path, bits: int) -> None:
    recipe = load_recipe(tiny.recipe)
    expected = features(merged, family_of(merged).load(merged), recipe)
    error = {}
    for method in ("rtn", "gptq"):
        model, _ = quantized(recipe, merged, method=method, bits=bits)
        error[method] = float((features(merged, model, recipe) - expected).norm())
    assert error["gptq"] < 0.9 * error["rtn"]


@pytest.mark.parametrize(
    ("preset", "changed"), [("paper", nn.Linear), ("features", (nn.Linear, nn.LayerNorm))]
)
def test_one_expert_almost_without_anchor_is_given_back(
    tiny: TinyZoo, merged: Path, preset: str, changed: type[nn.Module]
) -> None:
    """The expert differs from the merged model in what the preset may change."""
    exact = {"products": "float32", "solver": "float64"}
    flags = {"bits": 8, "anchor": 1e-7, "preset": preset, **exact}
    recipe = override(load_recipe(tiny.recipe), "quantize", flags)
    family = family_of(merged)
    expert, model, original = (family.load(merged) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    for name, module in expert.named_modules():
        if isinstance(module, changed) and ".layers." in name:
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.5 * noise * parameter.abs().mean().clamp(min=0.01)
    inputs = [
        batch
        for chosen in calibration_samples(recipe, family, merged).values()
        for batch in batches(chosen, family, merged, 24)
    ]
    quantize_model(
        model,
        family,
        QUANTIZATION_METHODS["epmq"],
        recipe.quantize,
        batches={"all": lambda: inputs},
        experts=OneExpert(expert),
    )
    expected = features(merged, expert, recipe)
    before = (features(merged, original, recipe) - expected).norm()
    assert (features(merged, model, recipe) - expected).norm() < 0.1 * before


def test_later_layers_see_the_quantized_earlier_ones(tiny: TinyZoo, merged: Path) -> None:
    """The last layer's problem is solved on the inputs the quantized model really gives it."""
    recipe = load_recipe(tiny.recipe)
    model, result = quantized(recipe, merged, method="gptq", bits=2, bias="keep")
    family = family_of(merged)
    last = family.blocks(model)[-1]
    name = last.layers[-1]
    accumulator = Accumulator()
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: accumulator.add(args[0])
    )
    for chosen in calibration_samples(recipe, family, merged).values():
        for inputs in batches(chosen, family, merged, 8):
            with torch.inference_mode():
                family.embed(model, *inputs)
    hook.remove()
    reported = next(report for report in result.reports if report.layer == name)
    linear = result.layers[name]
    original = family.load(merged).get_parameter(f"{name}.weight").double()
    gram = accumulator.statistics().gram.double()
    error = linear.dequantize().double() - original
    expected = float(((error @ gram) * error).sum() / ((original @ gram) * original).sum())
    # The report's Hessian is damped by 1% and sums over tasks; the ratio hardly moves.
    assert reported.error_after == pytest.approx(expected, rel=0.05)


def test_batch_size_changes_nothing_but_rounding(tiny: TinyZoo, merged: Path) -> None:
    recipe = load_recipe(tiny.recipe)
    one, _ = quantized(recipe, merged, batch_size=5)
    other, _ = quantized(recipe, merged, batch_size=24)
    close = torch.nn.functional.cosine_similarity(
        features(merged, one, recipe), features(merged, other, recipe)
    )
    assert close.min() > 0.999


def test_skipped_layers_are_reported_and_left_alone(tiny: TinyZoo, merged: Path) -> None:
    model, result = quantized(load_recipe(tiny.recipe), merged, skip=("*.layers.0.*", "*.fc2"))
    assert not any("layers.0." in name or name.endswith("fc2") for name in result.layers)
    assert len(result.layers) == 5 + len(OUTER)
    skipped = [report.layer for report in result.reports if report.reason == "skipped by option"]
    assert len(skipped) == 7
    original = family_of(merged).load(merged)
    for name in skipped:
        assert torch.equal(
            model.get_parameter(f"{name}.weight"), original.get_parameter(f"{name}.weight")
        )


def test_block_by_block_is_the_whole_model(tiny: TinyZoo, merged: Path) -> None:
    recipe = load_recipe(tiny.recipe)
    family = family_of(merged)
    model = family.load(merged)
    blocks = family.blocks(model)
    (inputs,) = batches(calibration_samples(recipe, family, merged)[TASKS[0]], family, merged, 100)
    cache = ActivationCache()
    (batch,) = capture_block_batches(
        model.get_submodule(blocks[0].name), lambda: family.embed(model, *inputs), cache
    )
    for block in blocks:
        advance(model.get_submodule(block.name), batch, cache)
    with torch.inference_mode():
        whole = model.vision_model(pixel_values=inputs[0]).last_hidden_state
    assert torch.equal(batch.hidden.value(), whole)


def test_artifact_on_disk_equals_the_result_and_is_deterministic(
    tiny: TinyZoo, merged: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(tiny.recipe)
    for name in ("one", "two"):
        quantize(recipe, merged, tmp_path / name)
    layers, replaced = load_artifact(tmp_path / "one")
    _, result = quantized(recipe, merged)
    assert set(layers) == set(result.layers)
    for name, linear in result.layers.items():
        assert torch.equal(layers[name].codes, linear.codes)
        assert torch.equal(layers[name].scales, linear.scales)
        assert torch.equal(layers[name].zero_points, linear.zero_points)
    assert all(torch.equal(replaced[name], value) for name, value in result.replaced.items())
    first, second = (read_manifest(tmp_path / name, "quantize").outputs for name in ("one", "two"))
    same = [name for name in first if name != "report.json"]  # the report holds times
    assert [first[name] for name in same] == [second[name] for name in same]


def test_tasks_without_calibration_data_are_named_together(
    tiny: TinyZoo, merged: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(tiny.recipe)
    tasks = {
        name: task.model_copy(update={"calibration": None}) for name, task in recipe.tasks.items()
    }
    with pytest.raises(MismatchError) as caught:
        quantize(recipe.model_copy(update={"tasks": tasks}), merged, tmp_path / "q")
    assert len(caught.value.problems) == len(TASKS)
    assert not (tmp_path / "q").exists()


def test_too_few_tokens_are_warned_about_with_the_numbers(
    tiny: TinyZoo, merged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantized(load_recipe(tiny.recipe), merged, method="gptq", samples=1)
    assert "15 calibration tokens for 32 input columns; at least 64" in caplog.text


def test_nan_in_the_model_names_layer_and_task(tiny: TinyZoo, merged: Path) -> None:
    recipe = load_recipe(tiny.recipe)
    family = family_of(merged)
    model = family.load(merged)
    model.get_parameter("vision_model.encoder.layers.1.layer_norm1.weight").data[0] = float("nan")
    (inputs,) = batches(calibration_samples(recipe, family, merged)[TASKS[0]], family, merged, 100)
    with pytest.raises(NumericsError, match=r"layers\.1\.self_attn\.q_proj: task 'red'"):
        quantize_model(
            model,
            family,
            QUANTIZATION_METHODS["gptq"],
            override(recipe, "quantize", {"method": "gptq"}).quantize,
            batches={"red": lambda: [inputs]},
        )


def test_skip_patterns_must_match(tiny: TinyZoo, merged: Path) -> None:
    with pytest.raises(RecipeError, match=r"\*\.fc9 matches no layer"):
        quantized(load_recipe(tiny.recipe), merged, method="rtn", skip=("*.fc1", "*.fc9"))
