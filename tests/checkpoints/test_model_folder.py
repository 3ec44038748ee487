"""The layout of a model folder is told once, by the files in it."""

from pathlib import Path

import pytest

from epmq_deploy.checkpoints.model_folder import LAYOUTS, ModelFolder
from epmq_deploy.errors import RecipeError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
OPEN_CLIP = ("open_clip_config.json", "open_clip_model.safetensors")


def folder_with(path: Path, *names: str) -> ModelFolder:
    for name in names:
        (path / name).write_text("{}")
    return ModelFolder.at(path)


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        ((), "transformers"),
        (("config.json", WHOLE), "transformers"),
        (("config.json", INDEX), "transformers"),
        (OPEN_CLIP, "open_clip"),
        (OPEN_CLIP[:1], "open_clip"),
        ((*OPEN_CLIP, "config.json", WHOLE), "transformers"),
        (ADAPTER, "adapter"),
        (ADAPTER[:1], "adapter"),
        ((*ADAPTER, "open_clip_config.json"), "adapter"),
        ((*ADAPTER, *OPEN_CLIP), "open_clip"),
        ((*ADAPTER, WHOLE), "transformers"),
    ],
)
def test_files_tell_the_layout(tmp_path: Path, names: tuple[str, ...], layout: str) -> None:
    assert folder_with(tmp_path, *names).layout is LAYOUTS[layout]


@pytest.mark.parametrize("whole", [(WHOLE,), OPEN_CLIP])
def test_an_expert_is_a_model_or_an_adapter_but_not_both(
    tmp_path: Path, whole: tuple[str, ...]
) -> None:
    folder = folder_with(tmp_path, *ADAPTER, *whole)
    folder.check_base()
    with pytest.raises(RecipeError, match=rf"both an adapter .* and a whole model \({whole[-1]}"):
        folder.check_expert()


def test_a_base_is_not_an_adapter(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, *ADAPTER)
    folder.check_expert()
    with pytest.raises(RecipeError, match="an adapter, where a whole model is needed"):
        folder.check_base()


def nested_adapters(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir()
        for file in ADAPTER:
            (folder / name / file).write_text("{}")


def test_one_of_several_adapters_is_chosen_by_name(tmp_path: Path) -> None:
    nested_adapters(tmp_path, "one", "other")
    assert ModelFolder.open(str(tmp_path), "other").path == tmp_path / "other"
    with pytest.raises(RecipeError, match="several adapters; choose one with adapter: one, other"):
        ModelFolder.open(str(tmp_path))
    with pytest.raises(RecipeError, match="no adapter third; it holds one, other"):
        ModelFolder.open(str(tmp_path), "third")


def test_the_folder_itself_comes_before_the_adapters_in_it(tmp_path: Path) -> None:
    folder_with(tmp_path, *ADAPTER)
    nested_adapters(tmp_path, "one", "checkpoint-500")
    assert ModelFolder.open(str(tmp_path)).path == tmp_path
    assert ModelFolder.open(str(tmp_path), "one").path == tmp_path / "one"


def test_the_only_adapter_in_a_folder_is_taken_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nested_adapters(tmp_path, "mine")
    caplog.set_level("INFO")
    assert ModelFolder.open(str(tmp_path)).path == tmp_path / "mine"
    assert "its only adapter is used, mine" in caplog.text


def test_a_whole_model_has_no_adapters_to_choose_from(tmp_path: Path) -> None:
    folder_with(tmp_path, WHOLE)
    with pytest.raises(RecipeError, match="no adapter mine; it holds none"):
        ModelFolder.open(str(tmp_path), "mine")


def test_settings_are_read_once(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, WHOLE)
    assert folder.config is None
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert folder.config is None
    assert ModelFolder.at(tmp_path).config == {"model_type": "bert"}


def test_missing_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "one", "b": "two"}}')
    (tmp_path / "one").touch()
    with pytest.raises(RecipeError, match=r"shards missing: two$"):
        ModelFolder.at(tmp_path).check_base()
