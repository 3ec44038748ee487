"""What ``epmq merge`` looks at before it begins, and that one message names all of it."""

import json
from pathlib import Path

import pytest
import torch
from command_line import run
from tiny_folder import copied, edit
from tiny_text import TinyText
from tiny_zoo import TASKS, TinyZoo
from transformers import CLIPModel

from epmq_deploy.errors import MismatchError, NumericsError
from epmq_deploy.merging.stage import merge
from epmq_deploy.merging.task_vectors import CheckpointTaskVectors
from epmq_deploy.recipe import load_recipe, override

NAN = float("nan")
FC1 = "encoder.layers.0.mlp.fc1.weight"


def without_layer(folder: Path, part: str) -> int:
    """Delete an expert's tensors of one layer; how many they are."""
    removed = []

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        removed.extend(name for name in tensors if part in name)
        for name in removed:
            del tensors[name]

    edit(folder, remove)
    return len(removed)


def set_nan(name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Spoil the tensor whose name ends like this."""
    next(value for key, value in tensors.items() if key.endswith(name)).view(-1)[0] = NAN


def problems_of(recipe_file: Path, output: Path, **flags: object) -> list[str]:
    with pytest.raises(MismatchError) as caught:
        merge(override(load_recipe(recipe_file), "merge", flags), output)
    assert not output.exists()
    return list(caught.value.problems)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_what_every_expert_lacks_is_not_silently_the_base_s(
    tiny: TinyZoo, tmp_path: Path, method: str
) -> None:
    recipe_file = copied(tiny, tmp_path / "zoo")
    for task in TASKS:
        count = without_layer(tmp_path / "zoo" / "experts" / task, "layers.1.")
    edit(tmp_path / "zoo" / "experts" / "red", lambda tensors: set_nan(FC1, tensors))
    found = problems_of(recipe_file, tmp_path / "merged", method=method)
    assert len(found) == 2
    assert found[0].startswith("no expert has vision_model.encoder.layers.1.")
    assert found[0].endswith(f"and {count - 3} more tensor(s), which the base has")
    assert found[1] == f"expert 'red': NaN or infinite values in vision_model.{FC1}"


def test_what_every_encoder_lacks_is_named_too(tiny_text: TinyText, tmp_path: Path) -> None:
    recipe_file = copied(tiny_text, tmp_path / "zoo")
    for folder in (tmp_path / "zoo" / "experts").iterdir():
        without_layer(folder, "layer.0.attention.self.query")
    found = problems_of(recipe_file, tmp_path / "merged")
    assert len(found) == 1
    query = "encoder.layer.0.attention.self.query"
    assert found[0] == f"no expert has {query}.bias, {query}.weight, which the base has"


def test_nan_that_would_be_copied_from_the_base_is_named_with_the_rest(
    tiny: TinyZoo, tmp_path: Path
) -> None:
    recipe_file = copied(tiny, tmp_path / "zoo")
    copied_name, merged_name = "text_model.final_layer_norm.weight", f"vision_model.{FC1}"
    edit(tmp_path / "zoo" / "base", lambda tensors: set_nan(copied_name, tensors))
    alone = problems_of(recipe_file, tmp_path / "merged")
    assert alone == [
        f"base: NaN or infinite values in {copied_name}, which merging copies unchanged"
    ]
    edit(tmp_path / "zoo" / "base", lambda tensors: set_nan(merged_name, tensors))
    edit(tmp_path / "zoo" / "experts" / "blue", lambda tensors: set_nan(FC1, tensors))
    assert problems_of(recipe_file, tmp_path / "merged", method="ties") == [
        f"expert 'blue': NaN or infinite values in {merged_name}",
        f"base: NaN or infinite values in {merged_name}",
        *alone,
    ]


def test_a_copied_tensor_that_the_output_dtype_cannot_hold_is_not_blamed_on_merging(
    tiny: TinyZoo, tmp_path: Path
) -> None:
    recipe_file = copied(tiny, tmp_path / "zoo")

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["text_model.final_layer_norm.weight"][0] = 1e6

    edit(tmp_path / "zoo" / "base", enlarge)
    recipe = override(load_recipe(recipe_file), "merge", {"dtype": "float16"})
    with pytest.raises(NumericsError) as caught:
        merge(recipe, tmp_path / "merged")
    assert "text_model.final_layer_norm.weight, which is copied from the base" in str(caught.value)
    assert "scaling" not in str(caught.value)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "pcb"])
def test_data_is_looked_at_before_any_task_vector(
    tiny: TinyZoo, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_file = copied(tiny, tmp_path / "zoo")
    (tmp_path / "zoo" / "data" / "green" / "calibration.parquet").unlink()

    def refuse(*arguments: object) -> None:
        raise AssertionError("experts were read")

    for name in ("of_task", "of_tensor", "with_base", "with_bases"):
        monkeypatch.setattr(CheckpointTaskVectors, name, refuse)
    found = problems_of(recipe_file, tmp_path / "merged", method=method, search=True)
    assert len(found) == 1
    assert "green/calibration.parquet: no such file or folder" in found[0]


def test_models_layouts_data_heads_and_values_are_named_together(
    tiny: TinyZoo, tmp_path: Path
) -> None:
    recipe_file, zoo = copied(tiny, tmp_path / "zoo"), tmp_path / "zoo"
    weights = zoo / "experts" / "red" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    without_layer(zoo / "experts" / "green", FC1)
    edit(zoo / "experts" / "blue", lambda tensors: set_nan(FC1, tensors))
    (zoo / "data" / "green" / "calibration.parquet").unlink()
    (zoo / "heads" / "blue.safetensors").unlink()
    found = problems_of(recipe_file, tmp_path / "merged", method="ties", search=True)
    expected = (
        "expert 'red': ",
        "task 'green': ",
        "task 'blue': ",
        f"expert 'blue': NaN or infinite values in vision_model.{FC1}",
        f"expert 'green': lacks vision_model.{FC1}",
    )
    assert len(found) == len(expected)
    for text, start in zip(found, expected, strict=True):
        assert text.startswith(start)
    assert "only pickled weights" in found[0]


def test_run_looks_at_the_experts_that_can_be_opened_too(
    tiny: TinyZoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_file, zoo = copied(tiny, tmp_path / "zoo"), tmp_path / "zoo"
    weights = zoo / "experts" / "red" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    without_layer(zoo / "experts" / "green", FC1)
    assert run("run", recipe_file, "-o", tmp_path / "out") == 3
    found = capsys.readouterr().err
    assert "expert 'red': " in found
    assert f"expert 'green': lacks vision_model.{FC1}" in found


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_names_the_dtype_that_is_written(
    tiny: TinyZoo, tmp_path: Path, key: str
) -> None:
    recipe_file = copied(tiny, tmp_path / "zoo")
    file = tmp_path / "zoo" / "base" / "config.json"
    config = json.loads(file.read_text())
    config.pop("dtype", None)
    parts = [config, config["vision_config"], config["text_config"]]
    for part in parts:
        part.pop("dtype", None)
        part[key] = "float32"
    file.write_text(json.dumps(config))
    recipe = override(load_recipe(recipe_file), "merge", {"dtype": "float16"})
    merge(recipe, tmp_path / "half")
    written = json.loads((tmp_path / "half" / "config.json").read_text())
    for part in parts:
        part[key] = "float16"
    assert written == config
    assert CLIPModel.from_pretrained(tmp_path / "half").dtype == torch.float16
    merge(load_recipe(recipe_file), tmp_path / "same")
    assert (tmp_path / "same" / "config.json").read_bytes() == file.read_bytes()
