"""Distillation of all weights: judged on samples held back, kept only where it helps, resumable."""

import logging
from pathlib import Path

import pytest
import torch
from tiny_zoo import TASKS, TinyZoo

from epmq_deploy.errors import RecipeError
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.quantization.artifact import load_artifact
from epmq_deploy.quantization.distillation import quantize_trained
from epmq_deploy.quantization.distillation import weights as weights_module
from epmq_deploy.quantization.distillation.training import WeightTraining
from epmq_deploy.quantization.sequential import apply_quantized
from epmq_deploy.quantization.stage import quantize
from epmq_deploy.recipe import Recipe, load_recipe, override


@pytest.fixture(scope="module")
def merged(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge") / "merged"
    merge(load_recipe(tiny.recipe), folder)
    return folder


def training(tiny: TinyZoo, epochs: int, **options: object) -> Recipe:
    return override(
        load_recipe(tiny.recipe),
        "quantize",
        {"distill_weights": epochs, "bits": 8, "effort": "fast", **options},
    )


def same_artifact(first: Path, second: Path) -> bool:
    """Whether two quantized models hold the same codes, scales and parameters, bit for bit."""
    (layers, replaced), (others, other_replaced) = map(load_artifact, (first, second))
    return (
        layers.keys() == others.keys()
        and replaced.keys() == other_replaced.keys()
        and all(torch.equal(layers[name].codes, others[name].codes) for name in layers)
        and all(torch.equal(layers[name].scales, others[name].scales) for name in layers)
        and all(torch.equal(replaced[name], other_replaced[name]) for name in replaced)
    )


def test_the_model_comes_closer_to_the_experts_on_samples_held_back(
    tiny: TinyZoo, merged: Path, tmp_path: Path
) -> None:
    manifest = quantize(training(tiny, 3), merged, tmp_path / "out")
    outcome = manifest.reported["distill_weights"]
    assert outcome["kept"]
    assert len(outcome["curve"]) == 3
    assert outcome["passes"] == pytest.approx(4)
    divergences = [epoch["divergence"] for epoch in outcome["curve"]]
    assert outcome["after"] == min(divergences) < outcome["before"]
    assert divergences[outcome["chosen"] - 1] == outcome["after"]


def test_every_parameter_that_is_no_code_is_stored(
    tiny: TinyZoo, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []

    def remember(model: torch.nn.Module, *rest: object, **named: object) -> object:
        result = quantize_trained(model, *rest, **named)  # type: ignore[arg-type]
        models.append(model)
        return result

    monkeypatch.setattr("epmq_deploy.quantization.phases.quantize_trained", remember)
    quantize(training(tiny, 1, skip=("*.fc1",)), merged, tmp_path / "out")
    stored = family_of(merged).load(merged)
    apply_quantized(stored, *load_artifact(tmp_path / "out"))
    for name, value in stored.state_dict().items():
        assert torch.equal(value, models[0].state_dict()[name]), name


def test_without_epochs_nothing_changes(tiny: TinyZoo, merged: Path, tmp_path: Path) -> None:
    recipe = override(load_recipe(tiny.recipe), "quantize", {"effort": "fast"})
    quantize(recipe, merged, tmp_path / "plain")
    manifest = quantize(training(tiny, 0, bits=4), merged, tmp_path / "none")
    assert "distill_weights" not in manifest.reported
    assert same_artifact(tmp_path / "plain", tmp_path / "none")


def test_what_does_not_help_is_not_kept_and_said(
    tiny: TinyZoo,
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(weights_module, "_RATE", 1e3)
    with caplog.at_level(logging.WARNING):
        manifest = quantize(training(tiny, 1), merged, tmp_path / "out")
    outcome = manifest.reported["distill_weights"]
    assert not outcome["kept"]
    assert outcome["chosen"] == 0
    assert outcome["after"] == outcome["before"]
    assert "its result is discarded" in caplog.text
    quantize(training(tiny, 0), merged, tmp_path / "plain")
    assert same_artifact(tmp_path / "plain", tmp_path / "out")


def test_a_rate_that_destroys_the_start_is_lowered_and_said(
    tiny: TinyZoo,
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(weights_module, "_RATE", 0.3)
    with caplog.at_level(logging.WARNING):
        manifest = quantize(training(tiny, 8), merged, tmp_path / "out")
    outcome = manifest.reported["distill_weights"]
    rates = [epoch["rate"] for epoch in outcome["curve"]]
    assert rates[0] == 0.3
    assert rates[1] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)
    assert len(rates) == 8
    assert outcome["kept"]
    assert "epoch 1 moved the model away from the experts" in caplog.text
    assert "so it goes on from epoch 0 with 0.1" in caplog.text


def test_a_later_epoch_that_destroys_the_model_is_taken_back(
    tiny: TinyZoo, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    divergences = iter([1.0, 0.8, 1.2, 0.9])
    begun: list[torch.Tensor] = []
    original = WeightTraining._epoch

    def remember(self: WeightTraining, *rest: object) -> object:
        begun.append(torch.cat([each.detach().flatten() for each in self._parameters.values()]))
        return original(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(WeightTraining, "_epoch", remember)
    monkeypatch.setattr(
        "epmq_deploy.quantization.distillation.training.mean_divergence",
        lambda _: next(divergences),
    )
    manifest = quantize(training(tiny, 3), merged, tmp_path / "out")
    outcome = manifest.reported["distill_weights"]
    first, second, third = (epoch["rate"] for epoch in outcome["curve"])
    assert first == second == pytest.approx(3 * third)
    assert (outcome["chosen"], outcome["after"]) == (1, 0.8)
    # The third epoch goes on from where the first one ended.
    assert torch.equal(begun[2], begun[1])
    assert not torch.equal(begun[1], begun[0])


@pytest.mark.parametrize("killed_at", [1, 2])
@pytest.mark.parametrize("rate", [3e-4, 0.3])
def test_killed_between_epochs_it_goes_on_and_gives_the_same_weights(
    tiny: TinyZoo,
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
    rate: float,
) -> None:
    monkeypatch.setattr(weights_module, "_RATE", rate)
    recipe = training(tiny, 4)
    whole = quantize(recipe, merged, tmp_path / "whole")
    epoch = WeightTraining._epoch
    begun = []

    def killed(self: WeightTraining, standing: object, optimizer: object) -> object:
        begun.append(standing)
        if len(begun) > killed_at:
            raise KeyboardInterrupt
        return epoch(self, standing, optimizer)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WeightTraining, "_epoch", killed)
        quantize(recipe, merged, tmp_path / "resumed")
    calls = []

    def counted(self: WeightTraining, standing: object, optimizer: object) -> object:
        calls.append(standing)
        return epoch(self, standing, optimizer)  # type: ignore[arg-type]

    monkeypatch.setattr(WeightTraining, "_epoch", counted)
    resumed = quantize(recipe, merged, tmp_path / "resumed")
    assert len(calls) == 4 - killed_at
    assert resumed.reported == whole.reported
    assert same_artifact(tmp_path / "whole", tmp_path / "resumed")
    assert {item.name for item in tmp_path.iterdir()} == {"whole", "resumed"}


def test_too_few_samples_are_refused_before_any_work(
    tiny: TinyZoo, merged: Path, tmp_path: Path
) -> None:
    message = (
        r"quantize\.distill_weights needs at least 16 calibration samples for every task; "
        rf"too few for {', '.join(sorted(TASKS))}: add samples"
    )
    with pytest.raises(RecipeError, match=message):
        quantize(training(tiny, 1, samples=15), merged, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_it_needs_calibration_data(tiny: TinyZoo) -> None:
    with pytest.raises(RecipeError, match="leave out alpha, norms, distill, distill_weights"):
        training(tiny, 1, preset="weights", effort=None)


@pytest.mark.parametrize("held", [{"bias": "keep"}, {"norms": False}])
def test_what_it_trains_cannot_be_held(tiny: TinyZoo, held: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"distill_weights tunes biases and norms: leave out"):
        training(tiny, 1, **held)
