"""Targets pick formats, and refuse what their kernels do not take, naming what to change."""

import dataclasses
import types
from typing import Any

import pytest
import torch
from torch import nn

from epmq_deploy.calibration.targets.rtn import RtnOptions
from epmq_deploy.errors import RecipeError
from epmq_deploy.exporters.formats import format_names
from epmq_deploy.exporters.packed_linear import pack_linear
from epmq_deploy.exporters.targets import (
    TARGETS,
    LayerGrid,
    check_export,
    check_target,
    chosen_formats,
    chosen_two_bit_containers,
    planned_grids,
)
from epmq_deploy.models import Block, Group
from epmq_deploy.recipe import ExportOptions, override, parse_recipe

GOOD = LayerGrid(bits=4, block_size=64, in_features=128, symmetric=True)


def grid(**changes: Any) -> LayerGrid:
    return dataclasses.replace(GOOD, **changes)


@pytest.mark.parametrize("target", TARGETS)
def test_the_portable_grid_suits_every_target(target: str) -> None:
    check_target(ExportOptions(target=target, formats=("matmulnbits",)), {"layer": GOOD})


@pytest.mark.parametrize(
    ("target", "layer", "message"),
    [
        ("tensorrt", grid(block_size=32), "fc1 is stored in blocks of 32.*--group-size 128"),
        ("tensorrt", grid(block_size=256), "64 or 128.*--group-size"),
        ("tensorrt", grid(symmetric=False), "zero points.*--symmetric"),
        ("tensorrt", grid(bits=8), "8 bits.*--bits 4.*--skip"),
        ("qnn", grid(symmetric=False), "--symmetric"),
        ("qnn", grid(bits=8), "--bits 4"),
        ("openvino", grid(in_features=112, block_size=32), "blocks of 32.*divide 112 inputs"),
    ],
)
def test_what_a_target_refuses(target: str, layer: LayerGrid, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"target {target}: .*{message}"):
        check_target(ExportOptions(target=target), {"fc1": layer})
    check_target(ExportOptions(), {"fc1": layer})
    check_target(ExportOptions(target=target, formats=("fp16",)), {"fc1": layer})
    check_target(ExportOptions(target="cpu", formats=("matmulnbits",)), {"fc1": layer})


def test_every_kind_of_problem_is_named_at_once() -> None:
    layers = {
        "one": grid(block_size=16),
        "two": grid(block_size=32),
        "three": grid(symmetric=False),
    }
    with pytest.raises(RecipeError) as error:
        check_target(ExportOptions(target="tensorrt"), layers)
    text = str(error.value)
    assert "one and 1 more are stored in blocks of 16 or 32" in text
    assert "three is stored with zero points" in text


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
    with pytest.raises(RecipeError, match="'toaster'; known: cpu, cuda"):
        check_export(ExportOptions(target="toaster"))


def test_two_bit_containers() -> None:
    assert chosen_two_bit_containers(ExportOptions(target="cpu")) is None
    assert chosen_two_bit_containers(ExportOptions(target="cuda")) is False
    with pytest.raises(RecipeError, match="--no-two-bit-containers"):
        check_export(ExportOptions(target="cuda", two_bit_containers=True))


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
