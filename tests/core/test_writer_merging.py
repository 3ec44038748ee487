"""Merging models that write texts with calibration data."""

from pathlib import Path

import pytest
from merged_writers import MergedWriter, two_streams

from epmq_deploy.errors import RecipeError
from epmq_deploy.merging.merge import merge
from epmq_deploy.recipe import override


@two_streams
@pytest.mark.parametrize("method", ["regmean", "regmean_pp"])
def test_least_squares_merging_takes_one_sequence_of_blocks(
    merged_writer: MergedWriter, tmp_path: Path, method: str
) -> None:
    recipe = override(merged_writer.recipe, "merge", {"method": method})
    with pytest.raises(RecipeError, match=f"{method} takes models whose blocks form one sequence"):
        merge(recipe, tmp_path / "out")
    assert not list(tmp_path.iterdir())
