"""Hub ids with and without a revision; the hub itself is never asked."""

from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict

from epmq_deploy.checkpoints.hub import HubId, hub_id
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.data.loading import load_samples
from epmq_deploy.errors import RecipeError
from epmq_deploy.models import family_of
from epmq_deploy.recipe import DataSource, load_recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubId("owner/name", None)),
        ("owner/name@main", HubId("owner/name", "main")),
        ("owner/name@refs/pr/15", HubId("owner/name", "refs/pr/15")),
        ("o-w.n_er/na-me.v1@v1.0", HubId("o-w.n_er/na-me.v1", "v1.0")),
        ("name", None),
        ("name@main", None),
        ("a/b/c", None),
        ("a/b/c@main", None),
        ("owner/name@", None),
        ("./name", None),
        ("../name", None),
        ("/name", None),
        ("~/name", None),
        ("owner/", None),
        ("my data/name", None),
        ("data/a.parquet", None),
        ("data/a@2.parquet", None),
        ("models/a.bin", None),
    ],
)
def test_what_is_an_id(text: str, expected: HubId | None) -> None:
    assert hub_id(text) == expected


class Hub:
    """In place of the hub: repositories by id and revision, and what was asked for."""

    def __init__(self, folder: Path, files: dict[tuple[str, str | None], list[str]]) -> None:
        self.folder, self.files = folder, files
        self.asked: list[tuple[str, str | None]] = []

    def snapshot_download(
        self, repository: str, *, revision: str | None, allow_patterns: list[str]
    ) -> str:
        self.asked.append((repository, revision))
        assert not any("bin" in pattern for pattern in allow_patterns)
        for name in self.files[repository, revision]:
            if name.endswith((".json", ".safetensors")):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).touch()
        return str(self.folder)

    def list_repo_files(self, repository: str, *, revision: str | None) -> list[str]:
        return self.files[repository, revision]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (tmp_path / "snapshot").mkdir()
    made = Hub(tmp_path / "snapshot", {})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", made.list_repo_files)
    return made


def test_the_revision_is_fetched(hub: Hub) -> None:
    hub.files["owner/name", "refs/pr/15"] = ["config.json", "model.safetensors"]
    hub.files["owner/name", None] = ["config.json", "model.safetensors"]
    assert ModelFolder.open("owner/name@refs/pr/15").path == hub.folder
    assert ModelFolder.open("owner/name").path == hub.folder
    assert hub.asked == [("owner/name", "refs/pr/15"), ("owner/name", None)]


def test_adapters_in_folders_of_their_own_are_fetched(hub: Hub) -> None:
    parts = ("adapter_config.json", "adapter_model.safetensors")
    files = [f"{name}/{part}" for name in ("one", "other") for part in parts]
    hub.files["owner/name", None] = files
    assert ModelFolder.open("owner/name", "other").path == hub.folder / "other"
    with pytest.raises(RecipeError, match="several adapters; choose one with adapter: one, other"):
        ModelFolder.open("owner/name")


@pytest.mark.parametrize("revision", [None, "v1"])
def test_pickles_on_the_hub_are_named_with_what_to_do(hub: Hub, revision: str | None) -> None:
    wanted = "owner/name" if revision is None else f"owner/name@{revision}"
    files = ["config.json", "flax_model.msgpack", "pytorch_model.bin", "sub/model.safetensors"]
    hub.files["owner/name", revision] = files
    with pytest.raises(RecipeError) as caught:
        ModelFolder.open(wanted)
    message = str(caught.value)
    assert message.startswith(
        f"{wanted}: its repository on the hub has only pickled weights (pytorch_model.b"
    )
    assert "as owner/name@REVISION" in message
    option = "" if revision is None else f" --revision {revision}"
    assert f"hf download owner/name{option} --local-dir name && python -c" in message
    assert message.endswith(" name/pytorch_model.bin name/model.safetensors")


def test_shards_and_adapters_on_the_hub_are_found(hub: Hub) -> None:
    hub.files["owner/shards", None] = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    with pytest.raises(RecipeError, match=r"'shards/pytorch_model-\*\.bin' shards/model\.safet"):
        ModelFolder.open("owner/shards")
    hub.files["owner/lora", None] = ["adapter_config.json", "adapter_model.bin"]
    with pytest.raises(RecipeError, match=r"lora/adapter_model\.bin lora/adapter_model\.safete"):
        ModelFolder.open("owner/lora")


def test_a_repository_without_weights_is_said_to_have_none(hub: Hub) -> None:
    hub.files["owner/name", None] = ["README.md"]
    with pytest.raises(
        RecipeError, match="owner/name: its repository on the hub has no safetensors"
    ):
        ModelFolder.open("owner/name")


def test_a_hub_that_cannot_be_asked_is_an_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    hub.files["owner/name", None] = ["config.json"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    with pytest.raises(RecipeError, match=r"listing its files on the hub failed \(no route\)"):
        ModelFolder.open("owner/name")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(RecipeError, match=r"loading it from the hub failed \(no route\)"):
        ModelFolder.open("owner/name@v1")


def test_an_existing_folder_wins(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name@2").mkdir(parents=True)
    (tmp_path / "r.yaml").write_text(
        "base: {path: owner/name@2}\ntasks: {t: {expert: other/name@refs/pr/15}}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.base.path == str(tmp_path / "owner" / "name@2")
    assert recipe.tasks["t"].expert == "other/name@refs/pr/15"
    monkeypatch.chdir(tmp_path)
    assert ModelFolder.open("owner/name@2").path == Path("owner/name@2")
    assert hub.asked == []


def test_data_have_revisions_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*arguments: Any, **options: Any) -> DatasetDict:
        asked.append((arguments, options))
        return DatasetDict({"train": Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})})

    monkeypatch.setattr(datasets, "load_dataset", load)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for path, revision in (("owner/data@refs/pr/2", "refs/pr/2"), ("owner/data", None)):
        source = DataSource(path=path, subset="small")
        assert len(load_samples("t", source, family_of(tmp_path))) == 2
        assert asked.pop() == (("owner/data", "small"), {"revision": revision})
