"""Scaling that rises with depth."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_zoo import TinyZoo
from torch import Tensor

from epmq_deploy.errors import RecipeError
from epmq_deploy.merging.depth import depth_factors
from epmq_deploy.merging.stage import check_options, merge
from epmq_deploy.models import Block
from epmq_deploy.recipe import Recipe, load_recipe, override

BLOCKS = "vision_model.encoder.layers"


def merged(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    merge(recipe, folder)
    return load_file(folder / "model.safetensors")


def test_factors_rise_linearly_in_every_stream() -> None:
    blocks = [Block(f"enc.{index}", (), stream="enc") for index in range(11)]
    blocks += [Block(f"dec.{index}", (), stream="dec") for index in range(2)]
    blocks.append(Block("once", (), stream="once"))
    names = ["shared", "enc.0.w", "enc.1.w", "enc.10.w", "dec.0.w", "dec.1.w", "once.w", "norm"]
    found = depth_factors(blocks, names, 0.5)
    expected = [0.5, 0.5, 0.55, 1.0, 0.5, 1.0, 1.0, 0.5]
    assert [found[name] for name in names] == pytest.approx(expected)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv_m"])
def test_the_first_block_is_scaled_less(tiny: TinyZoo, tmp_path: Path, method: str) -> None:
    recipe = override(load_recipe(tiny.recipe), "merge", {"method": method, "scaling": 0.4})
    found = merged(override(recipe, "merge", {"first_block": 0.5}), tmp_path / "depth")
    by_hand = {"layers": ["*:scaling=0.2", f"{BLOCKS}.1.*:scaling=0.4"]}
    expected = merged(override(recipe, "merge", by_hand), tmp_path / "by-hand")
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6), name


def test_the_search_moves_all_blocks_together(tiny: TinyZoo, tmp_path: Path) -> None:
    flags = {"method": "tsv_m", "first_block": 0.5}
    recipe = override(load_recipe(tiny.recipe), "merge", flags)
    searched = override(recipe, "merge", {"search": True, "search_samples": 8})
    manifest = merge(searched, tmp_path / "searched")
    found = load_file(tmp_path / "searched" / "model.safetensors")
    plain = override(recipe, "merge", {"scaling": manifest.reported["scaling"]})
    expected = merged(plain, tmp_path / "plain")
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6), name


def test_other_towers_than_the_image_tower_have_no_known_blocks(tiny: TinyZoo) -> None:
    recipe = override(load_recipe(tiny.recipe), "merge", {"first_block": 0.5})
    both = recipe.model_copy(update={"base": recipe.base.model_copy(update={"part": "both"})})
    with pytest.raises(
        RecipeError, match=r"merge\.first_block knows the blocks of the image tower"
    ):
        check_options(both)
