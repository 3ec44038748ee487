"""The quantization engine's promises: resuming, bounded memory, choices per layer, no data."""

from pathlib import Path

import pytest
import torch
from interrupted import killed_in
from tiny_zoo import TASKS, TinyZoo

from epmq_deploy.artifacts.manifest import read_manifest
from epmq_deploy.calibration.cache import ActivationCache
from epmq_deploy.errors import NumericsError, RecipeError
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.quantization import stage as quantize_module
from epmq_deploy.quantization.artifact import load_artifact, load_inputs, load_reports
from epmq_deploy.quantization.context import CalibrationContext
from epmq_deploy.quantization.group_statistics import weight_statistics
from epmq_deploy.quantization.methods.epmq import EpmqOptions
from epmq_deploy.quantization.results import QuantizedModel
from epmq_deploy.quantization.sequential import BlockQuantizer
from epmq_deploy.quantization.stage import calibration_samples, quantize
from epmq_deploy.recipe import Recipe, load_recipe, override

FC2 = "vision_model.encoder.layers.1.mlp.fc2"


@pytest.fixture(scope="module")
def merged(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merge the tiny zoo."""
    folder = tmp_path_factory.mktemp("merge") / "merged"
    merge(load_recipe(tiny.recipe), folder)
    return folder


def run(recipe: Recipe, folder: Path, how: dict[str, object] | None = None, **options: object):
    """Quantize in memory; the model and the result."""
    recipe = override(recipe, "quantize", options)
    family = family_of(folder)
    ctx = CalibrationContext(
        family,
        folder,
        calibration_samples(recipe, family, folder),
        lambda: ExpertBackbone(open_sources(recipe), torch.device("cpu")),
        torch.device("cpu"),
    )
    return ctx.calibrate(recipe.quantize, **(how or {}))


def same(first: QuantizedModel, second: QuantizedModel) -> bool:
    """Whether two results hold the same codes, grids and parameters, bit for bit."""
    return all(
        torch.equal(linear.codes, second.layers[name].codes)
        and torch.equal(linear.scales, second.layers[name].scales)
        and torch.equal(linear.zero_points, second.layers[name].zero_points)
        for name, linear in first.layers.items()
    ) and all(torch.equal(value, second.replaced[name]) for name, value in first.replaced.items())


@pytest.mark.parametrize("method", ["epmq", "gptq", "gptaq", "rtn"])
@pytest.mark.parametrize("block", [0, 1])
def test_a_killed_run_goes_on_and_gives_the_same_codes(
    tiny: TinyZoo,
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    block: int,
) -> None:
    recipe = override(load_recipe(tiny.recipe), "quantize", {"method": method, "group_size": 16})
    quantize(recipe, merged, tmp_path / "whole")
    killed_in(block, recipe, merged, tmp_path / "resumed", monkeypatch)
    done = []
    original = BlockQuantizer.quantize
    with monkeypatch.context() as patch:
        patch.setattr(
            BlockQuantizer,
            "quantize",
            lambda self, block: done.append(block) or original(self, block),
        )
        quantize(recipe, merged, tmp_path / "resumed")
    assert len(done) == 2 - block
    first, second = (
        read_manifest(tmp_path / name, "quantize").outputs for name in ("whole", "resumed")
    )
    assert {name: digest for name, digest in first.items() if name != "report.json"} == {
        name: digest for name, digest in second.items() if name != "report.json"
    }
    names = [
        [report.layer for report in load_reports(tmp_path / name)] for name in ("whole", "resumed")
    ]
    assert names[0] == names[1]
    assert not list(tmp_path.glob(".*unfinished*"))


def test_what_another_run_finished_is_not_used(
    tiny: TinyZoo, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = override(load_recipe(tiny.recipe), "quantize", {"method": "gptq", "bits": 3})
    with monkeypatch.context() as patch:
        patch.setattr(quantize_module, "save_artifact", lambda *_: (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):
            quantize(recipe, merged, tmp_path / "out")
    assert len(list(tmp_path.glob(".out.unfinished/block-*"))) == 2
    quantize(override(recipe, "quantize", {"bits": 4}), merged, tmp_path / "out")
    layers, _ = load_artifact(tmp_path / "out")
    assert {layer.bits for name, layer in layers.items() if ".layers." in name} == {4}


def test_activations_on_disk_change_nothing(tiny: TinyZoo, merged: Path) -> None:
    recipe = load_recipe(tiny.recipe)
    _, in_memory = run(recipe, merged, cache_limit=None)
    _, on_disk = run(recipe, merged, cache_limit=0)
    assert same(in_memory, on_disk)


def test_bfloat16_products_change_targets_little(tiny: TinyZoo, merged: Path) -> None:
    recipe = load_recipe(tiny.recipe)
    exact, low = (
        run(recipe, merged, {"rounding": False}, products=dtype)[0].get_parameter(f"{FC2}.weight")
        for dtype in ("float32", "bfloat16")
    )
    # bfloat16 rounds to 8 bits, each product by itself.
    assert 0 < (exact - low).norm() < 2**-6 * exact.norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_activations_change_little(tiny: TinyZoo, merged: Path, dtype: str) -> None:
    recipe = load_recipe(tiny.recipe)
    exact, result = run(recipe, merged)
    half, other = run(recipe, merged, cache_dtype=dtype)
    assert not same(result, other)
    weights = [model.get_parameter(f"{FC2}.weight") for model in (exact, half)]
    assert (weights[0] - weights[1]).norm() < 0.2 * weights[0].norm()


def test_nothing_is_left_in_the_cache(
    tiny: TinyZoo, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = []
    original = ActivationCache.__init__

    def remember(self: ActivationCache, *args: object, **kwargs: object) -> None:
        caches.append(self)
        original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ActivationCache, "__init__", remember)
    run(load_recipe(tiny.recipe), merged)
    # Only the hidden states after the last block may be alive, until the runner is collected.
    import gc

    gc.collect()
    assert [cache.in_memory for cache in caches] == [0]


def test_options_by_layer(tiny: TinyZoo, merged: Path) -> None:
    layers = ["*.fc2:bits=8,group_size=32", "*.layers.1.*:bits=2", "*.q_proj:symmetric=true"]
    _, result = run(load_recipe(tiny.recipe), merged, layers=layers)
    grids = {name: (item.bits, item.group_size) for name, item in result.layers.items()}
    assert grids["vision_model.encoder.layers.0.mlp.fc1"] == (4, 16)
    assert grids["vision_model.encoder.layers.0.mlp.fc2"] == (8, 32)
    # Of two patterns that match, the later one counts, option by option.
    assert grids["vision_model.encoder.layers.1.mlp.fc2"] == (2, 32)
    symmetric = {
        name for name, item in result.layers.items() if item.symmetric and ".layers." in name
    }
    assert len(symmetric) == 2
    assert all(name.endswith("q_proj") for name in symmetric)


@pytest.mark.parametrize("entry", ["*.fc2", "*.fc2:bits", "*.fc2:bits=5", "*.fc2:width=4"])
def test_malformed_options_by_layer_are_refused(tiny: TinyZoo, entry: str) -> None:
    with pytest.raises(RecipeError, match="layers"):
        override(load_recipe(tiny.recipe), "quantize", {"layers": [entry]})


def test_options_for_no_layer_are_refused(tiny: TinyZoo, merged: Path) -> None:
    with pytest.raises(RecipeError, match=r"quantize\.layers: \*\.fc9 matches no layer"):
        run(load_recipe(tiny.recipe), merged, layers=["*.fc9:bits=8"])
    outside = (
        r"^quantize\.layers: visual_projection matches no layer in the blocks; "
        r".*8 bits.*quantize\.skip"
    )
    with pytest.raises(RecipeError, match=outside):
        run(load_recipe(tiny.recipe), merged, layers=["visual_projection:bits=4"])
    # One that matches layers of both kinds is for those in the blocks.
    run(load_recipe(tiny.recipe), merged, method="rtn", layers=["*proj*:bits=8"])


def test_target_bits_are_met_and_reported(tiny: TinyZoo, merged: Path, tmp_path: Path) -> None:
    recipe = override(load_recipe(tiny.recipe), "quantize", {"target_bits": 5, "method": "gptq"})
    manifest = quantize(recipe, merged, tmp_path / "out")
    layers, _ = load_artifact(tmp_path / "out")
    layers = {name: item for name, item in layers.items() if ".layers." in name}
    weights = sum(layer.codes.numel() for layer in layers.values())
    mean = sum(layer.bits * layer.codes.numel() for layer in layers.values()) / weights
    assert {layer.bits for layer in layers.values()} == {4, 8}
    assert 4.5 < mean <= 5
    assert manifest.reported["bits"]["mean_bits"] == pytest.approx(mean)
    assert manifest.reported["bits"]["layers"] == {n: item.bits for n, item in layers.items()}


def test_target_size_is_met(tiny: TinyZoo, merged: Path, tmp_path: Path) -> None:
    sizes = {}
    for bits in (4, 8):
        _, result = run(load_recipe(tiny.recipe), merged, method="rtn", bits=bits)
        sizes[bits] = sum(
            item.codes.numel() * item.bits + item.scales.numel() * (32 + item.bits)
            for item in result.layers.values()
        )
    size = (sizes[4] + sizes[8]) / 2 / 8e6
    recipe = override(load_recipe(tiny.recipe), "quantize", {"method": "rtn", "target_size": size})
    quantize(recipe, merged, tmp_path / "out")
    layers, _ = load_artifact(tmp_path / "out")
    stored = sum(
        item.codes.numel() * item.bits + item.scales.numel() * (32 + item.bits)
        for item in layers.values()
    )
    assert 0.8 * size < stored / 8e6 <= size
    recipe = override(recipe, "quantize", {"target_size": sizes[4] / 9e6})
    with pytest.raises(RecipeError, match="target_size cannot be met"):
        quantize(recipe, merged, tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("anchor", ["abc", 0, -1, "nan", [1]])
def test_an_anchor_is_a_positive_number_or_auto(tiny: TinyZoo, anchor: object) -> None:
    with pytest.raises(RecipeError, match=r"^[^\n]*quantize\.anchor: .*number or auto[^\n]*$"):
        override(load_recipe(tiny.recipe), "quantize", {"anchor": anchor})
    for given, expected in (("0.3", 0.3), (2, 2.0), ("auto", "auto")):
        recipe = override(load_recipe(tiny.recipe), "quantize", {"anchor": given})
        assert recipe.quantize.model_dump()["anchor"] == expected


def test_anchor_auto_reports_its_curve(tiny: TinyZoo, merged: Path, tmp_path: Path) -> None:
    recipe = override(load_recipe(tiny.recipe), "quantize", {"anchor": "auto"})
    manifest = quantize(recipe, merged, tmp_path / "out")
    plan = manifest.reported["anchor"]
    curve = dict(plan["curve"])
    assert plan["anchor"] in curve
    assert len(curve) >= 3
    assert curve[plan["anchor"]] <= curve[EpmqOptions().values.anchor]
    fixed = override(recipe, "quantize", {"anchor": plan["anchor"]})
    quantize(fixed, merged, tmp_path / "fixed")
    codes = [read_manifest(tmp_path / name, "quantize").outputs for name in ("out", "fixed")]
    assert codes[0]["quantized.safetensors"] == codes[1]["quantized.safetensors"]


def test_anchor_auto_needs_samples_to_hold_back(
    tiny: TinyZoo, merged: Path, tmp_path: Path
) -> None:
    plain = load_recipe(tiny.recipe)
    headless = {
        name: task.model_copy(update={"head": None} if name == TASKS[0] else {})
        for name, task in plain.tasks.items()
    }
    few = "at least 8 calibration samples"
    missing = f"a head for every task .*; missing for {TASKS[0]}$"
    for recipe, options, problem in (
        (plain, {"samples": 7}, few),
        (plain, {"preset": "weights"}, r"^quantize\.anchor has no effect as auto with .*weights"),
        (plain.model_copy(update={"tasks": headless}), {}, missing),
    ):
        asked = override(recipe, "quantize", {"anchor": "auto", **options})
        with pytest.raises(RecipeError, match=problem):
            quantize(asked, merged, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_gptaq_without_rounding_is_the_merged_model(tiny: TinyZoo, merged: Path) -> None:
    """With nothing quantized before it, a layer's target is the merged weight itself."""
    model, _ = run(load_recipe(tiny.recipe), merged, {"rounding": False}, method="gptaq")
    original = family_of(merged).load(merged)
    for name, parameter in original.named_parameters():
        assert torch.allclose(model.get_parameter(name), parameter, atol=1e-4), name


def test_gptaq_undoes_more_of_earlier_errors_than_gptq(tiny: TinyZoo, merged: Path) -> None:
    recipe = load_recipe(tiny.recipe)
    family = family_of(merged)
    pixels = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    error = {}
    with torch.inference_mode():
        expected = family.embed(family.load(merged), pixels)
        for method in ("gptq", "gptaq"):
            model, _ = run(recipe, merged, method=method, bits=2)
            error[method] = float((family.embed(model, pixels) - expected).norm())
    assert error["gptaq"] < error["gptq"]


def test_without_data_targets_come_from_weights(
    tiny: TinyZoo, merged: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(tiny.recipe)
    bare = recipe.model_copy(
        update={
            "tasks": {
                name: task.model_copy(update={"calibration": None})
                for name, task in recipe.tasks.items()
            }
        }
    )
    bare = override(bare, "quantize", {"preset": "weights"})
    quantize(bare, merged, tmp_path / "out")
    layers, replaced = load_artifact(tmp_path / "out")
    assert len(layers) == 15
    assert not replaced
    assert load_inputs(tmp_path / "out") == {}
    assert read_manifest(tmp_path / "out", "quantize").reported["input_statistics"] == 0
    with pytest.raises(RecipeError, match="no calibration data"):
        override(bare, "quantize", {"alpha": 0.5})


def test_data_free_statistics_follow_task_vectors() -> None:
    base, vector = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    vector[:, 2] = 0
    statistics = weight_statistics({"a": base + vector, "b": base}, {"a": base, "b": base})
    assert torch.allclose(statistics.gram, vector.T @ vector, atol=1e-5)
    assert torch.allclose(statistics.cross["a"], (base + vector) @ vector.T @ vector, atol=1e-4)
    assert statistics.tokens == 0
    assert not statistics.gram[2].any()


def test_one_expert_without_data_is_given_back_where_its_task_vector_reaches(
    tiny: TinyZoo, merged: Path
) -> None:
    """One expert: what its task vector changed comes back whole as the anchor weakens."""
    recipe = load_recipe(tiny.recipe)
    one = recipe.model_copy(update={"tasks": {TASKS[0]: recipe.tasks[TASKS[0]]}})
    model, _ = run(one, merged, {"rounding": False}, preset="weights", anchor=1e-8)
    expert = ExpertBackbone(open_sources(one), torch.device("cpu"))
    expected = expert.tensor(TASKS[0], f"{FC2}.weight")
    vector = expected - expert.base_tensor(f"{FC2}.weight")
    start = family_of(merged).load(merged).get_parameter(f"{FC2}.weight")
    weight = model.get_parameter(f"{FC2}.weight")
    assert ((weight - expected) @ vector.T).norm() < 0.01 * ((start - expected) @ vector.T).norm()


def test_errors_are_probed_at_every_width(tiny: TinyZoo, merged: Path) -> None:
    family = family_of(merged)
    names = [name for block in family.blocks(family.load(merged)) for name in block.layers]
    how = {"rounding": False, "probe": dict.fromkeys(names, (2, 3, 4, 8))}
    _, result = run(load_recipe(tiny.recipe), merged, how, method="gptq")
    assert not result.layers
    assert len(result.errors) == 12
    for errors in result.errors.values():
        assert errors[2] > errors[3] > errors[4] > errors[8] > 0


def test_nan_in_calibration_data_names_task_and_row(
    tiny: TinyZoo, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(merged)
    collate = family.collate

    def spoiled(folder: Path, samples: list[object]) -> tuple[torch.Tensor, ...]:
        (pixels,) = collate(folder, samples)
        if len(pixels) > 5:
            pixels[4, 0, 0, 0] = float("nan")
        return (pixels,)

    monkeypatch.setattr(type(family), "collate", staticmethod(spoiled))
    with pytest.raises(NumericsError, match=r"task 'blue': row \d+ of .*calibration.parquet"):
        run(load_recipe(tiny.recipe), merged)


def test_padding_and_unread_tokens_are_left_out(tiny: TinyZoo, merged: Path) -> None:
    """A last block that counts its class token only is another one than one that counts all."""
    recipe = load_recipe(tiny.recipe)
    _, every = run(recipe, merged, unpooled_weight=1.0)
    _, pooled = run(recipe, merged, unpooled_weight=0.0)
    first = "vision_model.encoder.layers.0.mlp.fc2"
    assert torch.equal(every.layers[first].codes, pooled.layers[first].codes)
    assert not torch.equal(every.layers[FC2].codes, pooled.layers[FC2].codes)
    tokens = {report.layer: report.tokens for report in pooled.reports}
    assert tokens[FC2] == 24 * len(TASKS)
    assert tokens[first] == 24 * len(TASKS) * 5
