"""Every option of quantization reaches what it is for: no two choices give the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_zoo import TinyZoo

from epmq_deploy.data.agreement import tune
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.quantization.context import CalibrationContext
from epmq_deploy.quantization.results import QuantizedModel
from epmq_deploy.quantization.stage import calibration_samples
from epmq_deploy.recipe import load_recipe, override

SETTINGS: dict[str, Any] = {"bits": 3, "group_size": 16, "samples": 8, "products": "float32"}


@pytest.fixture(scope="module")
def quantized(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Quantizes the merged tiny zoo in memory; what was asked for before is not done again."""
    folder: Path = tmp_path_factory.mktemp("merge") / "merged"
    plain = load_recipe(tiny.recipe)
    merge(plain, folder)
    results: dict[str, QuantizedModel] = {}

    def quantize(**options: Any) -> QuantizedModel:
        if repr(options) not in results:
            recipe = override(plain, "quantize", SETTINGS | options)
            family = family_of(folder)
            samples = calibration_samples(recipe, family, folder)
            cpu = torch.device("cpu")
            experts = ExpertBackbone(open_sources(recipe), cpu)
            ctx = CalibrationContext(family, folder, samples, lambda: experts, cpu)
            _, results[repr(options)] = ctx.calibrate(recipe.quantize)
        return results[repr(options)]

    return quantize


def parts(result: QuantizedModel) -> dict[str, torch.Tensor]:
    """Everything that is deployed."""
    weights = {name: layer.dequantize() for name, layer in result.layers.items()}
    return weights | result.replaced


@pytest.mark.parametrize("method", ["epmq", "gptq", "gptaq"])
@pytest.mark.parametrize(
    "option",
    [
        {"refine": 0},
        {"act_order": False},
        {"clip_search": False},
        {"symmetric": True},
        {"bias": "keep"},
        {"bias": "joint"},
        {"seed": 1},
    ],
    ids=str,
)
def test_options_of_every_method(quantized: Any, method: str, option: dict[str, Any]) -> None:
    default, other = parts(quantized(method=method)), parts(quantized(method=method, **option))
    shared = default.keys() & other.keys()
    assert any(not torch.equal(default[name], other[name]) for name in shared)


@pytest.mark.parametrize(
    "option",
    [
        {"anchor": 3.0},
        {"alpha": 0.5},
        {"rho": 0.5},
        {"norms": False},
        {"unpooled_weight": 1.0},
        {"normalization": "none"},
        {"preset": "paper"},
        {"preset": "features"},
        {"preset": "weights"},
    ],
    ids=str,
)
def test_options_of_epmq(quantized: Any, option: dict[str, Any]) -> None:
    default, other = parts(quantized(method="epmq")), parts(quantized(method="epmq", **option))
    shared = [name for name in default if name in other and name.endswith(("proj", "fc1", "fc2"))]
    assert shared
    assert any(not torch.equal(default[name], other[name]) for name in shared)


@pytest.mark.parametrize("method", ["epmq", "gptq"])
def test_refinement_lowers_every_layer_s_error(quantized: Any, method: str) -> None:
    without, one, three = (
        {
            report.layer: report.error_after
            # The first group's problem is the same whatever later layers made of it.
            for report in quantized(method=method, refine=sweeps, bias="keep").reports
            if report.layer.endswith("layers.0.self_attn.k_proj")
        }
        for sweeps in (0, 1, 3)
    )
    assert without
    for name, error in without.items():
        assert three[name] <= one[name] < error


def test_what_is_better_by_chance_alone_is_not_chosen() -> None:
    """0.01 less on average, from differences of plus and minus 1."""
    signs = torch.tensor([1.0, -1.0] * 8)

    def noisy(strength: float) -> dict[str, torch.Tensor]:
        return {"a": torch.ones(16) if strength == 1 else 0.99 + signs}

    def sure(strength: float) -> dict[str, torch.Tensor]:
        return {"a": torch.ones(16) if strength == 1 else 0.99 + 0.01 * signs}

    assert tune(noisy, 1.0, factor=2.0, steps=1).value == 1.0
    assert tune(sure, 1.0, factor=2.0, steps=1).value != 1.0
