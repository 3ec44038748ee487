"""Wrong requests end before anything is written."""

import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.exporters import format_names, formats_of

LAYER = "vision_model.encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def case(tools: types.SimpleNamespace) -> Any:
    return tools.make_case(lambda name, weight: (4, 32, True))


def test_formats_are_discovered() -> None:
    assert format_names() == ("fp16", "fp32", "int8-expand", "matmulnbits", "qdq")


def test_unknown_format() -> None:
    known = "choose from fp16, fp32, int8-expand, matmulnbits, qdq"
    with pytest.raises(RecipeError, match=f"'gguf'; {known}"):
        formats_of(["qdq", "gguf"])


def test_format_given_twice() -> None:
    with pytest.raises(RecipeError, match="twice"):
        formats_of(["qdq", "qdq"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 20}, "opset is 21 to 25, not 20"),
        ({"opset": 26}, "opset is 21 to 25, not 26"),
        ({"accuracy_level": 5}, "accuracy level is 0 to 4"),
    ],
)
def test_options(
    case: Any, tools: types.SimpleNamespace, tmp_path: Path, options: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        tools.export(case, ["matmulnbits", "qdq"], tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_group_size(case: Any, tools: types.SimpleNamespace, tmp_path: Path) -> None:
    weight = case.model.backbone.get_submodule(LAYER).weight
    layers = case.layers | {LAYER: tools.quantize(weight, 4, 24, True)}
    with pytest.raises(RecipeError, match=f"{LAYER}: group size 24"):
        tools.export(dataclasses.replace(case, layers=layers), ["qdq"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_mismatch_is_listed(case: Any, tools: types.SimpleNamespace, tmp_path: Path) -> None:
    layer = case.layers[LAYER]
    wrong = dataclasses.replace(
        case,
        images=case.images[:1],
        layers={
            LAYER: dataclasses.replace(layer, codes=layer.codes[:, :32]),
            "vision_model.pre_layrnorm": layer,
            "vision_model.encoder.layers.1.mlp.fc1": dataclasses.replace(layer, bits=2),
        },
        replaced={
            "nowhere.bias": torch.zeros(1),
            f"{LAYER}.bias": torch.zeros(3),
            f"{LAYER}.weight": torch.zeros(112, 64),
        },
    )
    with pytest.raises(MismatchError) as error:
        tools.export(wrong, ["qdq"], tmp_path)
    text = str(error.value)
    assert "batch of less than 2" in text
    assert f"layer {LAYER}: codes are [112, 32], its weight is [112, 64]" in text
    assert "pre_layrnorm: no linear layer" in text
    assert "too large for 2 bits" in text
    assert "nowhere.bias: not in the model" in text
    assert f"{LAYER}.bias: torch.float32 [3]" in text
    assert f"{LAYER}.weight: its layer is quantized" in text
