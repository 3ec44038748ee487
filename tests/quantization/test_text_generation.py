"""Quantizing text-generation models: encoder and decoder, tied weights, resuming."""

from pathlib import Path

import pytest
import torch
from interrupted import killed_in
from merged_text_generators import MergedTextGenerator, inputs_of, logits, quantized, two_streams
from one_expert import OneExpert
from tiny_text_generators import TEXT_TASKS
from torch import Tensor, nn

from epmq_deploy.artifacts.manifest import read_manifest
from epmq_deploy.calibration.cache import CachedTensor
from epmq_deploy.calibration.statistics import Accumulator
from epmq_deploy.data.samples import batches
from epmq_deploy.quantization.artifact import load_artifact, load_reports
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.sequential import apply_quantized, quantize_model
from epmq_deploy.quantization.stage import calibration_samples, quantize
from epmq_deploy.recipe import override

EXACT = {"products": "float32", "solver": "float64"}


@pytest.mark.parametrize("method", sorted(QUANTIZATION_METHODS))
def test_every_layer_of_all_blocks_is_quantized(
    merged_text_generator: MergedTextGenerator, tmp_path: Path, method: str
) -> None:
    recipe = override(
        merged_text_generator.recipe, "quantize", {"method": method, "group_size": 16}
    )
    quantize(recipe, merged_text_generator.folder, tmp_path / "out")
    layers, replaced = load_artifact(tmp_path / "out")
    model = merged_text_generator.family.load(merged_text_generator.folder)
    names = {name for block in merged_text_generator.family.blocks(model) for name in block.layers}
    assert names <= layers.keys()
    assert {layers[name].bits for name in names} == {4}
    assert all(
        report.status in ("solved", "refitted", "kept") for report in load_reports(tmp_path / "out")
    )
    norms = {name for name in replaced if name.endswith("norm.weight")}
    expected = {
        f"{group.norm}.weight"
        for block in merged_text_generator.family.blocks(model)
        for group in block.groups
        if group.norm
    }
    assert norms == (expected if method == "epmq" else set())
    apply_quantized(model, layers, replaced)
    assert bool(torch.isfinite(logits(merged_text_generator, model)).all())


def test_tied_weights_have_the_same_codes(merged_text_generator: MergedTextGenerator) -> None:
    model, result = quantized(merged_text_generator, method="rtn")
    name = (
        "shared"
        if merged_text_generator.models.architecture.model_type == "t5"
        else "model.embed_tokens"
    )
    table, output = result.layers[name], result.layers["lm_head"]
    tied = merged_text_generator.models.architecture.settings["tie_word_embeddings"]
    assert torch.equal(table.codes, output.codes) == tied
    assert (table.bits, table.group_size, table.symmetric) == (8, 32, True)
    assert torch.equal(model.lm_head.weight, output.dequantize())
    assert torch.equal(model.get_input_embeddings().weight, table.dequantize())
    kept, _ = quantized(merged_text_generator, method="rtn", skip=("lm_head",))
    original = merged_text_generator.family.load(merged_text_generator.folder)
    assert torch.equal(kept.lm_head.weight, original.lm_head.weight)
    assert torch.equal(kept.get_input_embeddings().weight, table.dequantize()) != tied


def test_one_expert_almost_without_anchor_is_given_back(
    merged_text_generator: MergedTextGenerator,
) -> None:
    """Encoder and decoder alike: the expert differs in all the preset may change."""
    flags = {"bits": 8, "anchor": 1e-7, "preset": "outputs", "outer": False, **EXACT}
    recipe = override(merged_text_generator.recipe, "quantize", flags)
    family = merged_text_generator.family
    expert, model, original = (family.load(merged_text_generator.folder) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    inside = tuple(f"{block.name}." for block in family.blocks(model))
    for name, parameter in expert.named_parameters():
        # Norms of queries and keys are no part of what is re-fitted.
        fixed = "relative" in name or ".q_norm." in name or ".k_norm." in name
        if name.startswith(inside) and not fixed:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.3 * noise * parameter.abs().mean()
    inputs = inputs_of(recipe, merged_text_generator)
    quantize_model(
        model,
        family,
        QUANTIZATION_METHODS["epmq"],
        recipe.quantize,
        batches={"all": lambda: inputs},
        experts=OneExpert(expert),
        rounding=False,
    )
    expected = logits(merged_text_generator, expert)
    before = (logits(merged_text_generator, original) - expected).norm()
    assert (logits(merged_text_generator, model) - expected).norm() < 0.02 * before


def test_later_layers_see_the_quantized_earlier_ones(
    merged_text_generator: MergedTextGenerator,
) -> None:
    """Of every group of the last block, against the inputs the quantized model really gives."""
    model, result = quantized(merged_text_generator, method="gptq", bits=2, bias="keep")
    family = merged_text_generator.family
    original = family.load(merged_text_generator.folder)
    block = family.blocks(model)[-1]
    for group in block.groups:
        name = group.layers[-1]
        stream = block.stream if group.stream is None else group.stream
        gram = sum(
            gram_of_inputs(merged_text_generator, model, name, stream, task) for task in TEXT_TASKS
        )
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        reported = next(report for report in result.reports if report.layer == name)
        weight = original.get_parameter(f"{name}.weight").double()
        error = result.layers[name].dequantize().double() - weight
        expected = float(((error @ damped) * error).sum() / ((weight @ gram) * weight).sum())
        assert reported.error_after == pytest.approx(expected, rel=0.02), name


def gram_of_inputs(
    merged_text_generator: MergedTextGenerator, model: nn.Module, name: str, stream: str, task: str
) -> Tensor:
    """Mean over the real tokens of one task's samples, as the whole model runs."""
    family, folder = merged_text_generator.family, merged_text_generator.folder
    accumulator, weights = Accumulator(), []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: accumulator.add(args[0], weights[-1])
    )
    samples = calibration_samples(merged_text_generator.recipe, family, folder)[task]
    for inputs in batches(samples, family, folder, 8):
        real = family.tokens(*inputs, stream=stream).real
        assert real is not None
        weights.append(real.float())
        with torch.inference_mode():
            family.embed(model, *inputs)
    hook.remove()
    return accumulator.statistics().gram.double()


@two_streams
@pytest.mark.parametrize("block", [1, 3])
def test_a_killed_run_goes_on_and_gives_the_same_codes(
    merged_text_generator: MergedTextGenerator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
) -> None:
    """Killed in the encoder and in the decoder."""
    recipe = merged_text_generator.recipe
    quantize(recipe, merged_text_generator.folder, tmp_path / "whole")
    killed_in(block, recipe, merged_text_generator.folder, tmp_path / "resumed", monkeypatch)
    quantize(recipe, merged_text_generator.folder, tmp_path / "resumed")
    first, second = (
        read_manifest(tmp_path / name, "quantize").outputs for name in ("whole", "resumed")
    )
    for name in ("quantized.safetensors", "replaced.safetensors"):
        assert first[name] == second[name]


@two_streams
def test_activations_on_disk_change_nothing(
    merged_text_generator: MergedTextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What blocks receive besides hidden states, too: the encoder's output, masks and biases."""
    _, in_memory = quantized(merged_text_generator, cache_limit=None)
    shapes = set()
    original = CachedTensor.peek
    monkeypatch.setattr(
        CachedTensor, "peek", lambda self: shapes.add(original(self).dim()) or original(self)
    )
    _, on_disk = quantized(merged_text_generator, cache_limit=0)
    assert {3, 4} <= shapes
    for name, linear in in_memory.layers.items():
        assert torch.equal(linear.codes, on_disk.layers[name].codes)
