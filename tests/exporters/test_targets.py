"""Targets pick formats, and refuse what their kernels do not take, naming what to change."""

import dataclasses
import shlex
import types
from typing import Any

import pytest
import torch
from parsed_flags import parsed
from pydantic import ValidationError
from torch import nn

from epmq_deploy.cli.errors import flags_text
from epmq_deploy.errors import RecipeError
from epmq_deploy.exporters.formats import format_names
from epmq_deploy.exporters.packing.packed_linear import pack_linear
from epmq_deploy.exporters.targets import TARGETS
from epmq_deploy.exporters.targets.check import check_target
from epmq_deploy.exporters.targets.choice import (
    check_export,
    chosen_formats,
    chosen_two_bit_containers,
)
from epmq_deploy.exporters.targets.layer_grid import LayerGrid, planned_grids
from epmq_deploy.models import Block, Group
from epmq_deploy.quantization.methods.rtn import RtnOptions
from epmq_deploy.recipe import ExportOptions, Recipe, override, parse_recipe

# What the layers below differ from, so that every one of them needs its option.
OPTIONS = RtnOptions(bits=8, group_size=16)
GOOD = LayerGrid(bits=4, block_size=64, in_features=128, symmetric=True)


def grid(**changes: Any) -> LayerGrid:
    return dataclasses.replace(GOOD, **changes)


@pytest.mark.parametrize("target", TARGETS)
def test_the_portable_grid_suits_every_target(target: str) -> None:
    check_target(ExportOptions(target=target, formats=("matmulnbits",)), {"layer": GOOD}, OPTIONS)


@pytest.mark.parametrize(
    ("target", "layer", "message"),
    [
        ("tensorrt", grid(block_size=32), "fc1 is stored in blocks of 32.*group_size=128"),
        ("tensorrt", grid(block_size=256), "64 or 128.*group_size="),
        ("tensorrt", grid(symmetric=False), "zero points.*symmetric=true"),
        ("tensorrt", grid(bits=8), "8 bits.*bits=4"),
        (
            "tensorrt",
            grid(bits=8, outer=True),
            "8 bits, but its kernels take 4: quantize with skip=fc1$",
        ),
        ("qnn", grid(symmetric=False), "symmetric=true"),
        ("qnn", grid(bits=8), "bits=4"),
        ("openvino", grid(in_features=112, block_size=32), "blocks of 32.*divide 112 inputs"),
    ],
)
def test_what_a_target_refuses(target: str, layer: LayerGrid, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"target {target}: .*{message}"):
        check_target(ExportOptions(target=target), {"fc1": layer}, OPTIONS)
    check_target(ExportOptions(), {"fc1": layer}, OPTIONS)
    check_target(ExportOptions(target=target, formats=("fp16",)), {"fc1": layer}, OPTIONS)
    check_target(ExportOptions(target="cpu", formats=("matmulnbits",)), {"fc1": layer}, OPTIONS)


def test_every_kind_of_problem_is_named_at_once() -> None:
    layers = {
        "one": grid(block_size=16),
        "two": grid(block_size=32),
        "three": grid(symmetric=False),
    }
    with pytest.raises(RecipeError) as error:
        check_target(ExportOptions(target="tensorrt"), layers, OPTIONS)
    text = str(error.value)
    assert "one and 1 more are stored in blocks of 16 or 32" in text
    assert "three is stored with zero points" in text


class Model(nn.Module):
    """Linear layers in a block, and one of 8 bits behind it."""

    def __init__(self, *columns: int) -> None:
        super().__init__()
        self.block = nn.ModuleDict({f"fc{width}": nn.Linear(width, 8) for width in columns})
        self.projection = nn.Linear(64, 8)
        self.skipped = nn.Linear(64, 8)

    def grids(self, recipe: Recipe) -> dict[str, LayerGrid]:
        names = tuple(f"block.{name}" for name in self.block)
        return planned_grids(self, [Block("block", (Group(names),))], recipe.quantize)


@pytest.mark.parametrize("target", ["tensorrt", "qnn", "openvino"])
@pytest.mark.parametrize(
    "quantize",
    [
        {},
        {"bits": 8, "group_size": 32},
        {"bits": 3, "symmetric": True, "group_size": -1},
        {"bits": 4, "outer": False, "group_size": 256},
        {"layers": {"*.fc128": {"bits": 8, "group_size": 32}, "*.fc1*": {"symmetric": False}}},
        {"symmetric": True, "layers": {"*.fc448": {"bits": 2}, "*.fc112": {"group_size": 64}}},
        {"symmetric": True, "skip": ["skipped"], "group_size": 96},
    ],
)
def test_advice_followed_lets_a_target_run_every_layer(
    target: str, quantize: dict[str, Any]
) -> None:
    """The options named are read as a command reads its flags; some models need none."""
    options = ExportOptions(target=target)
    content = {"base": {"path": "b"}, "tasks": {"a": {"expert": "e"}}}
    followed = 0
    for columns in ((64, 128), (112, 448), (32, 96, 128, 512), (20, 64)):
        model = Model(*columns)
        recipe = parse_recipe(content | {"quantize": {"method": "rtn"} | quantize}, "test")
        try:
            check_target(options, model.grids(recipe), recipe.quantize)
        except RecipeError as error:
            recipe = parsed(recipe, "quantize", shlex.split(flags_text(error.options)))
            followed += 1
        check_target(options, model.grids(recipe), recipe.quantize)
        assert any(not recipe.quantize.skips(f"block.{name}") for name in model.block)
        assert set(quantize.get("skip", [])) <= set(recipe.quantize.skip)
    assert followed


@pytest.mark.parametrize("budget", [{"target_bits": 4.5}, {"target_size": 3.0}])
def test_bits_chosen_for_a_budget_are_changed_through_it(budget: dict[str, float]) -> None:
    quantize = budget | {"symmetric": True}
    content = {"base": {"path": "b"}, "tasks": {"a": {"expert": "e"}}, "quantize": quantize}
    recipe = parse_recipe(content, "test")
    layers = {"one": grid(), "two": grid(bits=8)}
    with pytest.raises(RecipeError, match=r"two is stored in 8 bits.*with target_bits=4$"):
        check_target(ExportOptions(target="qnn"), layers, recipe.quantize)
    changed = parsed(recipe, "quantize", ["--target-bits", "4"]).quantize
    assert (changed.target_bits, changed.target_size) == (4, None)


def test_bits_a_layer_has_of_its_own_are_not_changed_through_a_budget() -> None:
    own = {"two": {"bits": 8}}
    options = RtnOptions.model_validate({"symmetric": True, "target_bits": 5, "layers": own})
    layers = {"one": grid(), "two": grid(bits=8)}
    with pytest.raises(RecipeError, match=r"two is stored in 8 bits.*with layers=two:bits=4$"):
        check_target(ExportOptions(target="qnn"), layers, options)
    layers["one"] = grid(bits=8)
    with pytest.raises(RecipeError, match=r"with target_bits=4, layers=two:bits=4$"):
        check_target(ExportOptions(target="qnn"), layers, options)


def test_layers_of_a_kind_are_skipped_by_one_pattern() -> None:
    layers = {
        "a.0.fc1": grid(in_features=32, block_size=32),
        "a.1.fc1": grid(in_features=32, block_size=32),
        "a.0.fc2": grid(in_features=32, block_size=32),
        "a.1.fc2": grid(),
    }
    with pytest.raises(RecipeError, match=r"with skip=\*\.fc1,a\.0\.fc2$"):
        check_target(ExportOptions(target="tensorrt"), layers, RtnOptions(symmetric=True))


def test_formats_of_targets() -> None:
    assert chosen_formats(ExportOptions()) == ("matmulnbits", "qdq")
    assert chosen_formats(ExportOptions(target="webgpu")) == ("matmulnbits", "fp16")
    assert chosen_formats(ExportOptions(target="webgpu", formats=("qdq",))) == ("qdq",)
    # Registered in a branch of its own.
    known = {*format_names(), "int8-expand"}
    assert {name for target in TARGETS.values() for name in target.formats} <= known


def test_a_target_given_later_brings_its_formats() -> None:
    recipe = parse_recipe(
        {
            "base": {"path": "b"},
            "tasks": {"a": {"expert": "e"}},
            "export": {"formats": ["qdq"], "target": "tensorrt"},
        },
        "test",
    )
    assert chosen_formats(recipe.export) == ("qdq",)
    assert chosen_formats(override(recipe, "export", {"target": "webgpu"}).export) == (
        "matmulnbits",
        "fp16",
    )
    both = override(recipe, "export", {"target": "webgpu", "formats": ["fp16"]})
    assert chosen_formats(both.export) == ("fp16",)


def test_unknown_target() -> None:
    with pytest.raises(RecipeError, match="unknown export target 'toaster'; choose from cpu, cuda"):
        check_export(ExportOptions(target="toaster"))


def test_two_bit_containers() -> None:
    assert chosen_two_bit_containers(ExportOptions(target="cpu")) is None
    assert chosen_two_bit_containers(ExportOptions(target="cuda")) is False
    with pytest.raises(RecipeError, match=r"export\.two_bit_containers: false"):
        check_export(ExportOptions(target="cuda", two_bit_containers=True))


def test_options_without_effect_are_refused_all_at_once() -> None:
    chosen = {
        "two_bit_containers": True,
        "int8_activations": "static",
        "int8_error_budget": 0.1,
    }
    with pytest.raises(RecipeError) as caught:
        check_export(ExportOptions(formats=("qdq", "fp16"), **chosen))
    message = str(caught.value)
    for name in chosen:
        assert f"export.{name}" in message
    assert message.count("(qdq, fp16)") == 3
    check_export(ExportOptions(formats=("int8-expand", "matmulnbits"), **chosen))
    check_export(ExportOptions(target="cpu", **chosen))
    with pytest.raises(
        RecipeError, match=r"take no 2-bit containers.*; export\.int8_activations is"
    ):
        check_export(ExportOptions(target="cuda", **chosen))
    # As a manifest carries options, all of them given.
    check_export(ExportOptions(**ExportOptions(formats=("qdq",)).model_dump()))


@pytest.mark.parametrize("opset", [20, 26])
def test_opsets_that_cannot_be_written_are_no_options(opset: int) -> None:
    with pytest.raises(ValidationError, match="opset"):
        ExportOptions(opset=opset)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "columns"), [(32, 112), (48, 96), (-1, 96), (512, 64)])
def test_grids_are_foreseen(
    tools: types.SimpleNamespace, group: int, columns: int, bits: int
) -> None:
    """What is planned before quantization is what is packed after it."""
    model = nn.Sequential(nn.Linear(columns, 8))
    options = RtnOptions(group_size=group, layers={"0": {"bits": bits, "symmetric": True}})
    (planned,) = planned_grids(model, [Block("", (Group(("0",)),))], options).values()
    size = columns if group == -1 else min(group, columns)
    layer = tools.quantize(torch.randn(8, columns), bits, size, True)
    packed = pack_linear("0", layer)
    assert planned == LayerGrid.of(layer)
    assert planned.block_size == packed.block_size
    assert planned.symmetric == (packed.zero_points is None)
    assert planned_grids(model, [Block("", (Group(("0",)),))], RtnOptions(skip=("0",))) == {}
