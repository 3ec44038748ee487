"""Fixtures that all tests share."""

import os

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from merged_text_generators import MergedTextGenerator
from tiny_text import TinyText, build_tiny_text
from tiny_text_generators import TEXT_GENERATORS, build_tiny_text_generators
from tiny_zoo import TinyZoo, build_tiny_zoo

from epmq_deploy.merging.stage import merge
from epmq_deploy.recipe import load_recipe

# More threads than cores cost far more than they gain on models this small.
torch.set_num_threads(2)


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
