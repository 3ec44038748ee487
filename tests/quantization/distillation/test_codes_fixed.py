"""Distillation: scales, biases and norms move towards the experts' predictions, codes do not."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_zoo import TASKS, TinyZoo

from epmq_deploy.errors import RecipeError
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.quantization.artifact import load_artifact
from epmq_deploy.quantization.distillation import codes_fixed as distill_module
from epmq_deploy.quantization.sequential import apply_quantized
from epmq_deploy.quantization.stage import quantize, quantize_fingerprint
from epmq_deploy.recipe import Head, Recipe, load_recipe, override


@pytest.fixture(scope="module")
def merged(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge") / "merged"
    merge(load_recipe(tiny.recipe), folder)
    return folder


def distilling(tiny: TinyZoo, epochs: int) -> Recipe:
    return override(load_recipe(tiny.recipe), "quantize", {"distill": epochs})


def with_head(recipe: Recipe, head: Head | None) -> Recipe:
    """Return the recipe with another head of its first task."""
    changed = recipe.tasks[TASKS[0]].model_copy(update={"head": head})
    return recipe.model_copy(update={"tasks": {**recipe.tasks, TASKS[0]: changed}})


def test_codes_stay_and_the_divergence_falls(tiny: TinyZoo, merged: Path, tmp_path: Path) -> None:
    quantize(distilling(tiny, 0), merged, tmp_path / "plain")
    manifest = quantize(distilling(tiny, 2), merged, tmp_path / "tuned")
    outcome = manifest.reported["distill"]
    assert outcome["kept"]
    assert outcome["after"] < outcome["before"]
    (plain, _), (tuned, replaced) = (load_artifact(tmp_path / name) for name in ("plain", "tuned"))
    moved = set()
    for name, linear in plain.items():
        assert torch.equal(linear.codes, tuned[name].codes)
        assert torch.equal(linear.zero_points, tuned[name].zero_points)
        assert bool((tuned[name].scales > 0).all())
        if not torch.equal(linear.scales, tuned[name].scales):
            moved.add(name)
    assert moved == {name for name in plain if "embeddings" not in name}
    assert "vision_model.post_layernorm.weight" in replaced


@pytest.mark.parametrize("rate", [2e-3, 1e3])
def test_the_model_is_what_is_stored_kept_or_undone(
    tiny: TinyZoo, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    models = []
    original = distill_module.apply_quantized

    def remember(model: torch.nn.Module, *rest: object) -> None:
        original(model, *rest)  # type: ignore[arg-type]
        models.append(model)

    monkeypatch.setattr(distill_module, "apply_quantized", remember)
    monkeypatch.setattr(distill_module, "_RATE", rate)
    manifest = quantize(distilling(tiny, 2), merged, tmp_path / "out")
    assert manifest.reported["distill"]["kept"] == (rate < 1)
    stored = family_of(merged).load(merged)
    apply_quantized(stored, *load_artifact(tmp_path / "out"))
    for name, value in stored.state_dict().items():
        assert torch.equal(value, models[0].state_dict()[name]), name


def test_what_does_not_help_is_undone_and_said(
    tiny: TinyZoo,
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    quantize(distilling(tiny, 0), merged, tmp_path / "plain")
    monkeypatch.setattr(distill_module, "_RATE", 1e3)
    with caplog.at_level(logging.WARNING):
        manifest = quantize(distilling(tiny, 1), merged, tmp_path / "out")
    assert not manifest.reported["distill"]["kept"]
    assert "its result is discarded" in caplog.text
    (plain, before), (tuned, after) = (load_artifact(tmp_path / name) for name in ("plain", "out"))
    assert all(torch.equal(plain[name].scales, tuned[name].scales) for name in plain)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_task_needs_a_head(tiny: TinyZoo, merged: Path, tmp_path: Path) -> None:
    headless = with_head(distilling(tiny, 1), None)
    message = rf"quantize\.distill needs a head .* missing for {TASKS[0]}$"
    with pytest.raises(RecipeError, match=message):
        quantize(headless, merged, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_it_needs_calibration_data(tiny: TinyZoo) -> None:
    with pytest.raises(RecipeError, match="leave out alpha, norms, distill"):
        override(load_recipe(tiny.recipe), "quantize", {"preset": "weights", "distill": 1})


@pytest.mark.parametrize("held", [{"bias": "keep"}, {"norms": False}])
def test_what_it_tunes_cannot_be_held(tiny: TinyZoo, held: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"quantize: distill tunes biases and norms: leave out"):
        override(load_recipe(tiny.recipe), "quantize", {"distill": 1, **held})


@pytest.mark.parametrize("asked", [{"distill": 1}, {"anchor": "auto"}])
def test_heads_that_guide_the_codes_decide_them(
    tiny: TinyZoo, tmp_path: Path, asked: dict[str, object]
) -> None:
    def mark(recipe: Recipe, **flags: object) -> str:
        return quantize_fingerprint(override(recipe, "quantize", flags), "merged")[0]

    recipe = load_recipe(tiny.recipe)
    other = with_head(recipe, Head(classes=("ox", "owl")))
    assert mark(recipe) == mark(other)
    assert mark(recipe, **asked) != mark(other, **asked)
    file = tmp_path / "head.safetensors"
    given = with_head(recipe, Head(matrix=str(file)))
    save_file({"head": torch.zeros(2, 12)}, file)
    before = mark(given, **asked)
    save_file({"head": torch.ones(2, 12)}, file)
    assert mark(given, **asked) != before


def test_killed_while_distilling_it_goes_on_and_gives_the_same_files(
    tiny: TinyZoo, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = distilling(tiny, 2)
    whole = quantize(recipe, merged, tmp_path / "whole")

    def killed(*arguments: object) -> Iterator[None]:
        yield next(interleaved(*arguments))  # type: ignore[arg-type]
        raise KeyboardInterrupt

    interleaved = distill_module._interleaved
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill_module, "_interleaved", killed)
        quantize(recipe, merged, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    resumed = quantize(recipe, merged, tmp_path / "resumed")
    # The report has times in it.
    assert {**resumed.outputs, "report.json": ""} == {**whole.outputs, "report.json": ""}
    assert resumed.reported == whole.reported
    assert {item.name for item in tmp_path.iterdir()} == {"whole", "resumed"}
