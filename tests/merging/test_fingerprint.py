"""What decides a merge is in its fingerprint, and nothing else is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_zoo import TASKS, TinyZoo

from epmq_deploy.merging.stage import merge_fingerprint
from epmq_deploy.recipe import Head, load_recipe, override


def test_data_decide_the_merge_and_where_activations_are_kept_does_not(tiny: TinyZoo) -> None:
    recipe = override(load_recipe(tiny.recipe), "merge", {"method": "regmean"})
    moved = dict(recipe.tasks)
    moved["red"] = moved["red"].model_copy(update={"calibration": moved["blue"].calibration})
    assert merge_fingerprint(recipe, {}) != merge_fingerprint(
        recipe.model_copy(update={"tasks": moved}), {}
    )
    on_disk, fewer = (
        override(recipe, "merge", flags) for flags in ({"cache_limit": 0.0}, {"samples": 5})
    )
    assert merge_fingerprint(recipe, {}) == merge_fingerprint(on_disk, {})
    assert merge_fingerprint(recipe, {}) != merge_fingerprint(fewer, {})


def test_data_decide_a_searched_merge_and_no_other(tiny: TinyZoo) -> None:
    recipe = load_recipe(tiny.recipe)
    moved = dict(recipe.tasks)
    moved["red"] = moved["red"].model_copy(update={"calibration": moved["blue"].calibration})
    other = recipe.model_copy(update={"tasks": moved})
    assert merge_fingerprint(recipe, {}) == merge_fingerprint(other, {})
    searched, changed = (override(r, "merge", {"search": True}) for r in (recipe, other))
    assert merge_fingerprint(searched, {}) != merge_fingerprint(changed, {})
    assert set(TASKS) == set(recipe.tasks)


@pytest.mark.parametrize(
    ("flags", "decided"),
    [
        ({"method": "fisher"}, True),
        ({"method": "ties", "search": True}, True),
        ({"method": "regmean"}, False),
    ],
)
def test_heads_decide_the_merges_that_take_them(
    tiny: TinyZoo, tmp_path: Path, flags: dict[str, Any], decided: bool
) -> None:
    recipe = override(load_recipe(tiny.recipe), "merge", flags)
    file = tmp_path / "head.safetensors"
    blue = recipe.tasks["blue"].model_copy(update={"head": Head(matrix=str(file))})
    marks = []
    for value in (0.0, 1.0):
        save_file({"head": torch.full((2, 12), value)}, file)
        given = recipe.model_copy(update={"tasks": {**recipe.tasks, "blue": blue}})
        marks.append(merge_fingerprint(given, {}))
    assert (marks[0] != marks[1]) == decided
