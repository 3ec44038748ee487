"""Token weights from gradients."""

from pathlib import Path

import pytest
import torch
from merged_text_generators import MergedTextGenerator, two_streams
from tiny_families import ARCHITECTURES, build_tiny_models
from tiny_zoo import TASKS, TinyZoo
from torch import Tensor
from torch.nn import functional as F

from epmq_deploy.data.heads import build_heads
from epmq_deploy.data.samples import batches
from epmq_deploy.errors import RecipeError
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.quantization.artifact import load_artifact
from epmq_deploy.quantization.context import CalibrationContext
from epmq_deploy.quantization.guidance import guided, token_gradients
from epmq_deploy.quantization.results import QuantizedModel
from epmq_deploy.quantization.stage import calibration_samples, quantize
from epmq_deploy.recipe import Recipe, load_recipe, override


@pytest.fixture(scope="module")
def merged(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merge the tiny zoo."""
    folder = tmp_path_factory.mktemp("merge") / "merged"
    merge(load_recipe(tiny.recipe), folder)
    return folder


def context(recipe: Recipe, folder: Path) -> CalibrationContext:
    family, cpu = family_of(folder), torch.device("cpu")
    width = family.embedding_width(family.load(folder), folder)
    experts = ExpertBackbone(open_sources(recipe), cpu)
    samples = calibration_samples(recipe, family, folder)
    heads = build_heads(recipe.tasks, family, folder, width)
    return CalibrationContext(family, folder, samples, lambda: experts, cpu, heads=heads)


def same(first: QuantizedModel, second: QuantizedModel) -> bool:
    return all(
        torch.equal(linear.dequantize(), second.layers[name].dequantize())
        for name, linear in first.layers.items()
    )


def test_weights_grow_with_the_power_of_squared_gradients() -> None:
    squares = torch.tensor([[1.0, 4.0, 16.0, 0.0]])
    half = guided(None, squares, 0.5)
    assert torch.allclose(half, torch.tensor([[4 / 7, 8 / 7, 16 / 7, 0.01]]))
    padded = guided(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), squares, 1.0)
    assert torch.allclose(padded, torch.tensor([[0.4, 1.6, 0.0, 0.0]]))


@pytest.mark.parametrize("squares", [torch.zeros(2, 3), torch.full((2, 3), 7.0)])
def test_gradients_that_do_not_tell_tokens_apart_leave_weights_alone(squares: Tensor) -> None:
    weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.01, 0.0]])
    assert torch.allclose(guided(weights, squares, 0.5), weights)


def test_no_token_decides_alone() -> None:
    squares = torch.full((1, 1000), 1e-6)
    squares[0, 0] = 1.0
    assert guided(None, squares, 1.0).max() == 20


def test_gradients_are_those_of_the_divergence_from_the_expert(tiny: TinyZoo, merged: Path) -> None:
    """Against gradients for constants added to what a layer gives."""
    ctx = context(load_recipe(tiny.recipe), merged)
    task, model = TASKS[1], ctx.family.load(merged)
    inputs = list(batches(ctx.samples[task], ctx.family, merged, 8))
    blocks = ctx.family.blocks(model)
    result = token_gradients(model, blocks, ctx.judge(ctx.samples), task, inputs)
    assert len(result) == len(inputs) == 3
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        expert = ctx.heads[task](ctx.family.embed(ctx.experts().become(task), *inputs[2]))
    layers = blocks[1].groups[0].layers
    assert len(layers) == 3
    squares = []
    for name in layers:
        layer = model.get_submodule(name)
        added = torch.zeros(8, 5, layer.out_features, requires_grad=True)
        handle = layer.register_forward_hook(lambda module, args, out, added=added: out + added)
        logits = ctx.heads[task](ctx.family.embed(model, *inputs[2]))
        loss = F.kl_div(logits.log_softmax(1), expert.softmax(1), reduction="sum")
        squares.append(torch.autograd.grad(loss, added)[0].square().mean(dim=2))
        handle.remove()
    (received,) = result[2][layers[0]]
    assert torch.allclose(received, torch.stack(squares).mean(dim=0), rtol=1e-3, atol=1e-12)
    # In the last block only the pooled token's outputs reach the head.
    (last,) = result[2][blocks[1].groups[-1].layers[0]]
    assert (last[:, 0] > 0).all()
    assert not last[:, 1:].any()


def test_they_decide_the_codes_and_are_computed_once(
    tiny: TinyZoo, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tiny.recipe)
    ctx = context(recipe, merged)
    plain = ctx.calibrate(recipe.quantize)[1]
    options = override(recipe, "quantize", {"guidance": 0.5}).quantize
    first = ctx.calibrate(options)[1]
    monkeypatch.setattr("epmq_deploy.quantization.context.token_gradients", None)
    assert same(first, ctx.calibrate(options)[1])
    assert not same(first, plain)


def test_gradients_that_are_all_alike_change_nothing(
    tiny: TinyZoo, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = override(load_recipe(tiny.recipe), "quantize", {"products": "float32"})
    plain = context(recipe, merged).calibrate(recipe.quantize)[1]

    def alike(*args: object) -> list[dict[str, list[Tensor]]]:
        return [
            {name: [torch.full_like(run, 3.0) for run in runs] for name, runs in batch.items()}
            for batch in token_gradients(*args)  # type: ignore[arg-type]
        ]

    monkeypatch.setattr("epmq_deploy.quantization.context.token_gradients", alike)
    options = override(recipe, "quantize", {"guidance": 0.5}).quantize
    assert same(plain, context(recipe, merged).calibrate(options)[1])


@pytest.mark.parametrize("kind", ["albert", "deberta-v2", "swin"])
def test_layers_that_run_several_times(kind: str, tmp_path: Path) -> None:
    recipe = load_recipe(build_tiny_models(tmp_path, ARCHITECTURES[kind]).recipe)
    merge(recipe, tmp_path / "merged")
    ctx = context(recipe, tmp_path / "merged")
    plain = ctx.calibrate(recipe.quantize)[1]
    options = override(recipe, "quantize", {"guidance": 0.5}).quantize
    assert not same(plain, ctx.calibrate(options)[1])


@two_streams
def test_models_that_generate_text_need_no_heads(
    merged_text_generator: MergedTextGenerator, tmp_path: Path
) -> None:
    for guidance in (0.0, 0.5):
        recipe = override(merged_text_generator.recipe, "quantize", {"guidance": guidance})
        quantize(recipe, merged_text_generator.folder, tmp_path / f"{guidance}")
    plain, guided_codes = (load_artifact(tmp_path / f"{power}")[0] for power in (0.0, 0.5))
    for stream in ("encoder", "decoder"):
        names = [name for name in plain if name.startswith(f"{stream}.block")]
        assert any(not torch.equal(plain[n].codes, guided_codes[n].codes) for n in names)


def test_every_task_needs_a_head(tiny: TinyZoo, merged: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny.recipe)
    tasks = recipe.tasks | {TASKS[0]: recipe.tasks[TASKS[0]].model_copy(update={"head": None})}
    headless = override(recipe.model_copy(update={"tasks": tasks}), "quantize", {"guidance": 0.5})
    message = rf"quantize\.guidance needs a head .* missing for {TASKS[0]}$"
    with pytest.raises(RecipeError, match=message):
        quantize(headless, merged, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_it_needs_calibration_data(tiny: TinyZoo) -> None:
    with pytest.raises(
        RecipeError, match="leave out alpha, norms, distill, distill_weights, guidance"
    ):
        override(load_recipe(tiny.recipe), "quantize", {"preset": "weights", "guidance": 0.5})
