"""What an interrupted quantization leaves: blocks of one arithmetic alone, and no activations."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from interrupted import killed_in
from tiny_zoo import TinyZoo

from epmq_deploy.merging.stage import merge
from epmq_deploy.models import Block
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.results import QuantizedModel
from epmq_deploy.quantization.sequential import BlockQuantizer
from epmq_deploy.quantization.stage import quantize
from epmq_deploy.recipe import Recipe, load_recipe, override

Change = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def merged(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merge the tiny zoo."""
    folder = tmp_path_factory.mktemp("merge") / "merged"
    merge(load_recipe(tiny.recipe), folder)
    return folder


def blocks_done(
    recipe: Recipe, merged: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> list[list[Path]]:
    """Quantize; for every block quantized, the files in the run's scratch folder at its end."""
    files = []
    original = BlockQuantizer.quantize

    def remember(self: BlockQuantizer, block: Block) -> QuantizedModel:
        result = original(self, block)
        scratch = output.with_name(f".{output.name}.unfinished") / "scratch"
        files.append([file for file in scratch.rglob("*") if file.is_file()])
        return result

    with monkeypatch.context() as patch:
        patch.setattr(BlockQuantizer, "quantize", remember)
        quantize(recipe, merged, output)
    return files


def other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch were given more threads."""
    threads = torch.get_num_threads() + 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)


def other_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that ``products: auto`` means another dtype on."""
    target = QUANTIZATION_METHODS["epmq"]
    now = target.products_dtype(target.options())
    other = torch.float32 if now == torch.bfloat16 else torch.bfloat16
    monkeypatch.setattr(type(target), "products_dtype", lambda *_: other)


@pytest.mark.parametrize("change", [other_threads, other_products])
def test_blocks_of_another_arithmetic_are_not_mixed_in(
    tiny: TinyZoo,
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Change,
) -> None:
    recipe = load_recipe(tiny.recipe)
    killed_in(1, recipe, merged, tmp_path / "out", monkeypatch)
    change(monkeypatch)
    with caplog.at_level(logging.INFO):
        assert len(blocks_done(recipe, merged, tmp_path / "out", monkeypatch)) == 2
    (message,) = [
        text for text in caplog.messages if text.startswith("starting from the beginning: ")
    ]
    assert "1 finished blocks" in message
    assert not list(tmp_path.glob(".*"))


def test_activations_on_disk_lie_beside_the_output(
    tiny: TinyZoo, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    # Where the folder's modification time would show what was written and deleted again.
    before = elsewhere.stat().st_mtime_ns
    recipe = override(load_recipe(tiny.recipe), "quantize", {"cache_limit": 0, "anchor": "auto"})
    files = blocks_done(recipe, merged, tmp_path / "out", monkeypatch)
    assert len(files) > 2
    assert all(files)
    assert elsewhere.stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tmp"]


def test_activations_of_a_killed_run_are_deleted_by_the_next(
    tiny: TinyZoo, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tiny.recipe)
    killed_in(1, recipe, merged, tmp_path / "out", monkeypatch)
    stale = tmp_path / ".out.unfinished" / "scratch" / "epmq-killed" / "0"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"activations")
    # One block was finished; activations of the other stay in memory.
    assert blocks_done(recipe, merged, tmp_path / "out", monkeypatch) == [[]]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
