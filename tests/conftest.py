"""Fixtures that all tests share."""

import os
from collections.abc import Iterator

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from merged_text_generators import MergedTextGenerator
from remembered_traces import remembering
from tiny_text import TinyText, build_tiny_text
from tiny_text_generators import TEXT_GENERATORS, build_tiny_text_generators
from tiny_zoo import TinyZoo, build_tiny_zoo

from epmq_deploy.exporters.graphs import build
from epmq_deploy.merging.stage import merge
from epmq_deploy.recipe import load_recipe

# More threads than cores cost far more than they gain on models this small.
torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def remembered_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The same model is traced once in a run of the tests, by whichever worker comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traces"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "trace", remembering(folder))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyZoo:
    """A tiny random CLIP with three experts and data; read-only."""
    return build_tiny_zoo(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> TinyText:
    """A tiny random BERT with two experts and texts; read-only."""
    return build_tiny_text(tmp_path_factory.mktemp("tiny_text"))


@pytest.fixture(scope="session", params=TEXT_GENERATORS)
def merged_text_generator(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> MergedTextGenerator:
    """Tiny text-generation models, of one architecture, and their merge; read-only."""
    models = build_tiny_text_generators(
        tmp_path_factory.mktemp(request.param), TEXT_GENERATORS[request.param]
    )
    merge(load_recipe(models.recipe), models.folder / "merged")
    return MergedTextGenerator(models, models.folder / "merged")
