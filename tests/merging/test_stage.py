"""The merge stage on checkpoints in the layouts users have."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_folder import copied, edit
from tiny_zoo import TASKS, TinyZoo
from transformers import CLIPModel

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.checkpoints.writing import save_sharded, write_tensors
from epmq_deploy.errors import MismatchError, NumericsError, RecipeError
from epmq_deploy.merging import task_vectors
from epmq_deploy.merging.methods import MERGE_METHODS
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.models.experts import open_sources
from epmq_deploy.recipe import Recipe, load_recipe, override


def expert_tensors(tiny: TinyZoo, task: str) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(
        ModelFolder.at(tiny.expert(task)), family_of(tiny.base).canonical_key
    )
    return {name: checkpoint.load(name) for name in checkpoint.tensors}


def test_output_loads_as_clip_and_holds_the_formula_s_weights(
    tiny: TinyZoo, tmp_path: Path
) -> None:
    manifest = merge(load_recipe(tiny.recipe), tmp_path / "merged")
    found = CLIPModel.from_pretrained(tmp_path / "merged").state_dict()
    base = CLIPModel.from_pretrained(tiny.base).state_dict()
    experts = [expert_tensors(tiny, task) for task in TASKS]
    for name, value in base.items():
        expected = value
        if name in experts[0]:
            expected = value + 0.3 * sum(expert[name] - value for expert in experts)
        assert torch.allclose(found[name], expected, atol=1e-6), name
    assert not torch.equal(
        found["vision_model.encoder.layers.0.mlp.fc1.weight"],
        base["vision_model.encoder.layers.0.mlp.fc1.weight"],
    )
    assert manifest.reported["merged_tensors"] == len(experts[0])
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()


def test_one_expert_at_scaling_one_gives_back_its_tower(tiny: TinyZoo, tmp_path: Path) -> None:
    recipe = load_recipe(tiny.recipe)
    alone = recipe.model_copy(update={"tasks": {"red": recipe.tasks["red"]}})
    merge(override(alone, "merge", {"scaling": 1.0}), tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, value in expert_tensors(tiny, "red").items():
        assert torch.allclose(found[name], value, atol=1e-6)


def test_sharded_checkpoints_read_the_same(tiny: TinyZoo, tmp_path: Path) -> None:
    tensors = load_file(tiny.base / "model.safetensors")
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    save_sharded(tmp_path, layout, tensors.items(), max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    checkpoint = Checkpoint.open(ModelFolder.at(tmp_path))
    assert set(checkpoint.tensors) == set(tensors)
    assert all(torch.equal(checkpoint.load(name), value) for name, value in tensors.items())


@pytest.mark.parametrize("method", sorted(MERGE_METHODS))
def test_every_method_merges_checkpoints(tiny: TinyZoo, tmp_path: Path, method: str) -> None:
    recipe = load_recipe(tiny.recipe)
    if method == "slerp":
        two = {name: recipe.tasks[name] for name in TASKS[:2]}
        recipe = recipe.model_copy(update={"tasks": two})
    manifest = merge(override(recipe, "merge", {"method": method}), tmp_path / "merged")
    assert manifest.reported["method"] == method
    found = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tiny.base / "model.safetensors")
    assert found.keys() == base.keys()
    fc1 = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(found[fc1], base[fc1])
    assert all(bool(torch.isfinite(value).all()) for value in found.values())


def test_options_by_layer_reach_the_tensors_of_that_name(tiny: TinyZoo, tmp_path: Path) -> None:
    flags = {"layers": ["*.layers.0.*:scaling=0"]}
    merge(override(load_recipe(tiny.recipe), "merge", flags), tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tiny.base / "model.safetensors")
    first, second = (f"vision_model.encoder.layers.{index}.mlp.fc1.weight" for index in (0, 1))
    assert torch.equal(found[first], base[first])
    assert not torch.equal(found[second], base[second])


def test_a_pattern_that_names_no_merged_tensor_is_an_error(tiny: TinyZoo, tmp_path: Path) -> None:
    # The text tower is not merged.
    flags = {"layers": ["text_model.*:scaling=0"]}
    with pytest.raises(RecipeError, match=r"merge.layers: text_model.\* matches no tensor"):
        merge(override(load_recipe(tiny.recipe), "merge", flags), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_half_precision_output_on_request(tiny: TinyZoo, tmp_path: Path) -> None:
    recipe = override(load_recipe(tiny.recipe), "merge", {"dtype": "float16"})
    merge(recipe, tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float16}


def test_every_mismatch_is_named_at_once_and_nothing_is_written(
    tiny: TinyZoo, tmp_path: Path
) -> None:
    recipe_file = copied(tiny, tmp_path / "zoo")
    experts = tmp_path / "zoo" / "experts"
    fc1, fc2 = "encoder.layers.0.mlp.fc1.weight", "encoder.layers.1.mlp.fc2.weight"
    names = load_file(experts / "red" / "model.safetensors")
    prefix = "vision_model." if f"vision_model.{fc1}" in names else ""

    def break_red(tensors: dict[str, torch.Tensor]) -> None:
        tensors[prefix + fc1] = tensors[prefix + fc1][:-1].clone()
        tensors[prefix + "surplus.weight"] = torch.zeros(2)

    def break_green(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[prefix + fc2]
        tensors[prefix + fc1] = tensors[prefix + fc1].to(torch.float16)

    def break_blue(tensors: dict[str, torch.Tensor]) -> None:
        tensors[prefix + fc2][0, 0] = float("nan")

    edit(experts / "red", break_red)
    edit(experts / "green", break_green)
    edit(experts / "blue", break_blue)
    with pytest.raises(MismatchError) as caught:
        merge(load_recipe(recipe_file), tmp_path / "merged")
    text = str(caught.value)
    assert f"expert 'red': vision_model.{fc1} has shape [63, 32], the base has [64, 32]" in text
    assert "expert 'red': has vision_model.surplus.weight, which the base lacks" in text
    assert f"expert 'green': lacks vision_model.{fc2}" in text
    assert "expert 'green': " in text
    assert "float16" in text
    assert f"expert 'blue': NaN or infinite values in vision_model.{fc2}" in text
    assert len(caught.value.problems) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo"]


def test_methods_that_look_at_all_experts_first_see_checked_ones_alone(
    tiny: TinyZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_file = copied(tiny, tmp_path / "zoo")
    seen = []
    subtract = task_vectors._subtract

    def note(expert: Checkpoint, name: str, start: torch.Tensor, vector: torch.Tensor) -> None:
        subtract(expert, name, start, vector)
        seen.append(bool(torch.isfinite(vector).all()))

    monkeypatch.setattr(task_vectors, "_subtract", note)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(value for value in tensors.values() if value.dim() == 2)[0, 0] = float("inf")

    others = list(load_recipe(recipe_file).tasks)[1:]
    for task in others:
        edit(tmp_path / "zoo" / "experts" / task, spoil)
    recipe = override(load_recipe(recipe_file), "merge", {"method": "ties"})
    with pytest.raises(MismatchError) as caught:
        merge(recipe, tmp_path / "merged")
    assert len(caught.value.problems) == len(others)
    assert all(seen)
    assert seen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo"]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_values_found_wrong_while_merging_are_all_named_and_nothing_is_left(
    tiny: TinyZoo, tmp_path: Path, method: str
) -> None:
    recipe_file = copied(tiny, tmp_path / "zoo")
    spoiled = {"red": 0, "blue": -1}
    for task, place in spoiled.items():

        def spoil(tensors: dict[str, torch.Tensor], place: int = place) -> None:
            weights = [name for name in sorted(tensors) if tensors[name].dim() == 2]
            tensors[weights[place]][0, 0] = float("nan")

        edit(tmp_path / "zoo" / "experts" / task, spoil)
    recipe = override(load_recipe(recipe_file), "merge", {"method": method})
    with pytest.raises(MismatchError) as caught:
        merge(recipe, tmp_path / "merged")
    assert [text.split(":")[0] for text in caught.value.problems] == [
        f"expert {task!r}" for task in recipe.tasks if task in spoiled
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo"]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_the_order_of_tensors_in_an_expert_s_file_does_not_matter(
    tiny: TinyZoo, tmp_path: Path, method: str
) -> None:
    recipe_file = copied(tiny, tmp_path / "zoo")
    file = tmp_path / "zoo" / "experts" / "red" / "model.safetensors"
    # Loaded tensors are views of the file that is written anew.
    tensors = {name: value.clone() for name, value in reversed(load_file(file).items())}
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    write_tensors(file, layout, tensors.items())
    outputs = [
        merge(
            override(load_recipe(source), "merge", {"method": method}), tmp_path / str(index)
        ).outputs["model.safetensors"]
        for index, source in enumerate((tiny.recipe, recipe_file))
    ]
    assert outputs[0] == outputs[1]


def test_mixed_dtypes_merge_when_allowed(tiny: TinyZoo, tmp_path: Path) -> None:
    recipe_file = copied(tiny, tmp_path / "zoo")

    def to_half(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(torch.bfloat16)

    edit(tmp_path / "zoo" / "experts" / "red", to_half)
    recipe = load_recipe(recipe_file)
    with pytest.raises(MismatchError, match="mixed_dtypes"):
        merge(recipe, tmp_path / "merged")
    merge(override(recipe, "merge", {"mixed_dtypes": True}), tmp_path / "merged")


def test_overflow_in_the_output_dtype_is_an_error(tiny: TinyZoo, tmp_path: Path) -> None:
    recipe = override(load_recipe(tiny.recipe), "merge", {"dtype": "float16", "scaling": 1e8})
    with pytest.raises(NumericsError, match="float16"):
        merge(recipe, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_unknown_model_type_is_named(tiny: TinyZoo, tmp_path: Path) -> None:
    recipe_file = copied(tiny, tmp_path / "zoo")
    config = tmp_path / "zoo" / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "other"}))
    with pytest.raises(RecipeError, match="model type 'other' has no family of its own"):
        merge(load_recipe(recipe_file), tmp_path / "merged")


def test_every_missing_folder_is_named(tiny: TinyZoo, tmp_path: Path) -> None:
    recipe: Recipe = load_recipe(tiny.recipe)
    tasks = {
        name: task.model_copy(update={"expert": f"/nowhere/{name}"})
        for name, task in recipe.tasks.items()
    }
    with pytest.raises(MismatchError) as caught:
        merge(recipe.model_copy(update={"tasks": tasks}), tmp_path / "merged")
    assert len(caught.value.problems) == len(TASKS)


def test_whole_models_and_image_towers_mix_and_the_text_side_is_the_base_s(
    tiny: TinyZoo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe_file = copied(tiny, tmp_path / "zoo")
    whole = CLIPModel.from_pretrained(tiny.base)
    for name, value in expert_tensors(tiny, "red").items():
        whole.get_parameter(name).data = value
    whole.text_projection.weight.data += 1
    whole.save_pretrained(tmp_path / "zoo" / "experts" / "red")
    merge(load_recipe(recipe_file), tmp_path / "mixed")
    merge(load_recipe(tiny.recipe), tmp_path / "towers")
    assert "expert 'red' differs from the base in text_projection.weight" in caplog.text
    mixed, towers = (
        load_file(tmp_path / name / "model.safetensors") for name in ("mixed", "towers")
    )
    assert mixed.keys() == towers.keys()
    assert all(torch.equal(mixed[name], towers[name]) for name in mixed)


def test_another_architecture_of_the_same_shapes_is_refused(tiny: TinyZoo, tmp_path: Path) -> None:
    recipe_file = copied(tiny, tmp_path / "zoo")
    config = tmp_path / "zoo" / "experts" / "red" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 4}))
    with pytest.raises(MismatchError, match=r"num_attention_heads is 4 .* the base has 2"):
        merge(load_recipe(recipe_file), tmp_path / "merged")


def test_changed_settings_change_the_fingerprint(tiny: TinyZoo, tmp_path: Path) -> None:
    recipe_file = copied(tiny, tmp_path / "zoo")
    before = open_sources(load_recipe(recipe_file)).sha256()
    settings = tmp_path / "zoo" / "base" / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.5, 0.5, 0.5", "0.4, 0.5, 0.5", 1))
    after = open_sources(load_recipe(recipe_file)).sha256()
    assert {role for role in before if before[role] != after[role]} == {"base"}
