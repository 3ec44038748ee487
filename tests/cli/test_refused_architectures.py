"""Architectures that cannot be deployed are refused in one sentence, before any work."""

from pathlib import Path

import pytest
from command_line import run
from tiny_architectures import ARCHITECTURES, REFUSED
from tiny_families import FAMILY_TASKS, build_tiny_models
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("resnet", "ResNetModel has no blocks with linear layers, only convolutions"),
        ("squeezebert", "its encoder does not run without pooler"),
    ],
)
def test_the_part_that_is_in_the_way_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, part: str
) -> None:
    models = build_tiny_models(tmp_path, REFUSED[name])
    assert run("run", models.recipe, "-o", tmp_path / "out", "--quiet") != 0
    message = capsys.readouterr().err
    assert f"model type '{name}' has no family of its own" in message
    assert message.count(part) == 1
    assert not list((tmp_path / "out").glob("*"))


def test_deit_with_two_classifiers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture = ARCHITECTURES["deit"]
    models = build_tiny_models(tmp_path, architecture)
    for task, classes in FAMILY_TASKS.items():
        config = DeiTConfig(**architecture.settings, num_labels=classes)
        DeiTForImageClassificationWithTeacher(config).save_pretrained(models.expert(task))
    assert run("run", models.recipe, "-o", tmp_path / "out", "--quiet") != 0
    message = capsys.readouterr().err
    for task in FAMILY_TASKS:
        assert f"{task} has DeiT's two classifiers, on two tokens" in message
    assert not list((tmp_path / "out").glob("*"))
