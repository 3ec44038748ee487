"""Quantization that is killed on its way."""

from pathlib import Path

import pytest

from epmq_deploy.quantization.results import QuantizedModel
from epmq_deploy.quantization.sequential import BlockQuantizer
from epmq_deploy.quantization.stage import quantize
from epmq_deploy.recipe import Recipe


def killed_in(
    block: int, recipe: Recipe, merged: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantize into ``output``, but be killed in a block, counted from 0."""
    begun = []
    original = BlockQuantizer.quantize

    def killed(self: BlockQuantizer, chosen: object) -> QuantizedModel:
        begun.append(chosen)
        if len(begun) > block:
            raise KeyboardInterrupt
        return original(self, chosen)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(BlockQuantizer, "quantize", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize(recipe, merged, output)
    assert not output.exists()
