"""Bits per layer under a budget: layers with bits of their own, targets that cannot be met."""

import re
from pathlib import Path

import pytest
from tiny_zoo import TinyZoo

from epmq_deploy.errors import RecipeError
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.quantization.artifact import load_artifact
from epmq_deploy.quantization.bit_budget import BitBudget, bit_budget
from epmq_deploy.quantization.context import CalibrationContext
from epmq_deploy.quantization.planning import with_bits
from epmq_deploy.quantization.sequential import BlockQuantizer
from epmq_deploy.quantization.stage import quantize
from epmq_deploy.recipe import load_recipe, override


@pytest.fixture(scope="module")
def merged(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merge the tiny zoo."""
    folder = tmp_path_factory.mktemp("merge") / "merged"
    merge(load_recipe(tiny.recipe), folder)
    return folder


def budget(tiny: TinyZoo, merged: Path, **options: object) -> BitBudget:
    """Of the tiny zoo's model with these options."""
    chosen = override(load_recipe(tiny.recipe), "quantize", options).quantize
    family = family_of(merged)
    model = family.load(merged)
    return bit_budget(model, family.blocks(model), chosen)


@pytest.mark.parametrize("target", [{"target_bits": 6.0}, {"target_bits": 4.25}])
def test_bits_of_its_own_stay_and_count(
    tiny: TinyZoo,
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: dict[str, float],
) -> None:
    probed: set[str] = set()
    original = CalibrationContext.calibrate

    def remember(self: CalibrationContext, *args: object, **how: object) -> object:
        model, result = original(self, *args, **how)  # type: ignore[arg-type]
        probed.update(result.errors)
        return model, result

    monkeypatch.setattr(CalibrationContext, "calibrate", remember)
    options = {"method": "rtn", "layers": ["*.fc2:bits=8"], **target}
    recipe = override(load_recipe(tiny.recipe), "quantize", options)
    manifest = quantize(recipe, merged, tmp_path / "out")
    layers, _ = load_artifact(tmp_path / "out")
    layers = {name: layer for name, layer in layers.items() if ".layers." in name}
    own = {name for name in layers if name.endswith("fc2")}
    assert {layers[name].bits for name in own} == {8}
    assert probed == layers.keys() - own
    weights = sum(layer.codes.numel() for layer in layers.values())
    mean = sum(layer.bits * layer.codes.numel() for layer in layers.values()) / weights
    # The others differ in width, or there was no budget to spend.
    assert target["target_bits"] - 0.5 < mean <= target["target_bits"]
    assert manifest.reported["bits"]["mean_bits"] == pytest.approx(mean)


def test_chosen_bits_leave_a_layers_other_options(tiny: TinyZoo) -> None:
    recipe = override(load_recipe(tiny.recipe), "quantize", {"layers": ["a.fc2:group_size=32"]})
    own = with_bits(recipe.quantize, {"a.fc2": 8, "b.fc2": 4})
    assert (own.for_layer("a.fc2").bits, own.for_layer("a.fc2").group_size) == (8, 32)
    assert (own.for_layer("b.fc2").bits, own.for_layer("b.fc2").group_size) == (4, 16)


@pytest.mark.parametrize(
    ("options", "option", "unit"),
    [
        ({"target_size": 0.001}, "target_size", "MB"),
        ({"target_size": 0.01, "layers": ["*.fc2:bits=8,group_size=-1"]}, "target_size", "MB"),
        ({"target_bits": 1.5}, "target_bits", "bits"),
        ({"target_bits": 3.0, "layers": ["*.fc2:bits=8"]}, "target_bits", "bits"),
    ],
)
def test_the_least_possible_is_named_before_anything_is_calibrated(
    tiny: TinyZoo,
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, float],
    option: str,
    unit: str,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr(BlockQuantizer, "quantize", never)
    recipe = override(load_recipe(tiny.recipe), "quantize", options)
    with pytest.raises(RecipeError) as caught:
        quantize(recipe, merged, tmp_path / "out")
    text = str(caught.value)
    assert text.startswith(f"quantize.{option} cannot be met: {options[option]:g} {unit} asked for")
    least = float(re.findall(r"at least ([\d.]+) are needed", text)[0])
    assert not list(tmp_path.iterdir())
    assert budget(tiny, merged, **{**options, option: least})
    with pytest.raises(RecipeError, match="cannot be met"):
        budget(tiny, merged, **{**options, option: least * 0.998})


@pytest.mark.parametrize("target", [{"target_bits": 4.5}, {"target_size": 9.0}])
@pytest.mark.parametrize("given", [{"skip": ["*"]}, {"layers": ["*:bits=4"]}])
def test_a_target_needs_a_choice(
    tiny: TinyZoo,
    merged: Path,
    tmp_path: Path,
    target: dict[str, float],
    given: dict[str, list[str]],
) -> None:
    recipe = override(load_recipe(tiny.recipe), "quantize", {**target, **given})
    with pytest.raises(RecipeError, match=rf"^quantize\.{next(iter(target))}: there are no bits"):
        quantize(recipe, merged, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_narrow_codes_are_for_targets_below_four_bits(tiny: TinyZoo, merged: Path) -> None:
    assert set(budget(tiny, merged, target_bits=4).choices.values()) == {(4, 8)}
    assert set(budget(tiny, merged, target_bits=3.9).choices.values()) == {(2, 3, 4, 8)}
    own = ["*.fc2:bits=8"]
    assert set(budget(tiny, merged, target_bits=4.25, layers=own).choices.values()) == {
        (2, 3, 4, 8)
    }
