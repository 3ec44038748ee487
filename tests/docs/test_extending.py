"""The examples of the page on extending work when another package offers them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fenced_blocks import blocks_of
from tiny_text import build_tiny_text

GROUPS = {
    "signed_mean.py": ("epmq_deploy.merge_methods", "METHOD"),
    "fp32_clean.py": ("epmq_deploy.formats", "FORMAT"),
    "my_board.py": ("epmq_deploy.targets", "TARGET"),
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder in which the page's files are installed as a package's."""
    folder = tmp_path / "site"
    metadata = folder / "examples-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: examples\nVersion: 1.0\n")
    sections = []
    for block in blocks_of("extending.md"):
        if block.language == "python":
            (folder / block.file).write_text(block.text)
            group, name = GROUPS[block.file]
            module = block.file.removesuffix(".py")
            sections.append(f"[{group}]\n{module} = {module}:{name}\n")
    assert len(sections) == len(GROUPS)
    (metadata / "entry_points.txt").write_text("\n".join(sections))
    return folder


def epmq(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line where the examples are installed."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    code = "import sys; from epmq_deploy.cli.main import main; main(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_the_examples_work(site: Path, tmp_path: Path) -> None:
    tiny = build_tiny_text(tmp_path)
    method = ["--method", "signed_mean", "--strength", "0.5", "-q"]
    merged = epmq(site, "merge", tiny.recipe, "-o", tmp_path / "merged", *method)
    assert merged.returncode == 0, merged.stderr
    manifest = json.loads((tmp_path / "merged" / "manifest.json").read_text())
    assert manifest["recipe"]["merge"]["strength"] == 0.5
    flags = ["--method", "rtn", "--group-size", "16", "-q"]
    quantized = epmq(site, "quantize", tmp_path / "merged", "-o", tmp_path / "quantized", *flags)
    assert quantized.returncode == 0, quantized.stderr
    formats = ["--formats", "fp32-clean,qdq", "-q"]
    exported = epmq(site, "export", tmp_path / "quantized", "-o", tmp_path / "exported", *formats)
    assert exported.returncode == 0, exported.stderr
    graphs = json.loads((tmp_path / "exported" / "manifest.json").read_text())["details"]["graphs"]
    assert {graph["format"]: graph["low_bit"] for graph in graphs} == {
        "fp32": False,
        "fp32-clean": False,
        "qdq": True,
    }
    refused = epmq(
        site, "export", tmp_path / "quantized", "-o", tmp_path / "b", "--target", "my-board"
    )
    assert refused.returncode == 2
    assert "target my-board: " in refused.stderr
    assert "--group-size 32 --symmetric" in refused.stderr
