"""Fixtures that all tests share."""

import os

# Read when torch is imported; see epmq_deploy.cli.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from tiny_text import TinyText, build_tiny_text
from tiny_zoo import TinyZoo, build_tiny_zoo

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
