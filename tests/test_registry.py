"""Registries: what other installed packages offer, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from epmq_deploy.errors import RecipeError
from epmq_deploy.registry import MERGE_METHODS

METHOD = """
from typing import Literal
from pydantic import Field
from epmq_deploy.merging.base import MergeMethod
from epmq_deploy.options.merging import MergeOptions

class HalfOptions(MergeOptions):
    method: Literal["{name}"] = "{name}"
    share: float = Field(0.5, description="share of the sum that is added")

METHOD = MergeMethod(
    options=HalfOptions,
    summary="half the sum of the task vectors",
    source="nowhere",
    merge=lambda base, vectors, options, context: base + options.share * vectors.sum(dim=0),
)
"""


def epmq(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line where another package is installed."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    code = "import sys; from epmq_deploy.cli.main import main; main(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )


def install(site: Path, name: str) -> None:
    """Install a package that offers a merge method of this name."""
    (site / "halves.py").write_text(METHOD.format(name=name))
    metadata = site / "halves-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[epmq_deploy.merge_methods]\nhalf = halves:METHOD\n"
    )


def test_another_package_adds_a_method_with_its_flags(tmp_path: Path) -> None:
    install(tmp_path, "half")
    listed = json.loads(epmq(tmp_path, "merge", "--list", "--json").stdout)["methods"]
    assert [item["name"] for item in listed] == [*MERGE_METHODS, "half"]
    assert listed[-1]["options"]["share"]["default"] == 0.5
    assert "--share" in epmq(tmp_path, "merge", "--help").stdout


def test_a_name_defined_twice_is_an_error_that_names_both(tmp_path: Path) -> None:
    install(tmp_path, "ties")
    done = epmq(tmp_path, "merge", "--list")
    assert done.returncode != 0
    message = "merge method 'ties' is defined twice: in epmq_deploy.merging.methods.ties and in"
    assert f"{message} halves:METHOD" in done.stderr


def test_an_unknown_name_is_answered_with_all_names() -> None:
    with pytest.raises(RecipeError, match="unknown merge method 'magic'; choose from adamerging, "):
        MERGE_METHODS.named("magic")
