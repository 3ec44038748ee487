"""Fixtures that tests of the command line share."""

from pathlib import Path

import pytest
from command_line import run
from tiny_zoo import TinyZoo


@pytest.fixture(scope="session")
def chain(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the outputs of the four commands, run one after the other; read-only."""
    out = tmp_path_factory.mktemp("chain")
    assert run("merge", tiny.recipe, "-o", out / "merged", "--quiet") == 0
    assert run("quantize", out / "merged", "-o", out / "quantized", "--quiet") == 0
    assert run("export", out / "quantized", "-o", out / "onnx", "--quiet") == 0
    assert run("eval", out / "onnx", "--quiet") == 0
    return out
