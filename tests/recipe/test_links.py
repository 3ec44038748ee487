"""Recipes, models and data may be links into a content store whose files have no names."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tiny_families import ARCHITECTURES, build_tiny_models
from tiny_text_generators import TEXT_GENERATORS, build_tiny_text_generators

import epmq_deploy as epmq
from epmq_deploy.data.loading import load_samples
from epmq_deploy.merging.preflight import check_experts
from epmq_deploy.models import family_of
from epmq_deploy.models.experts import open_sources
from epmq_deploy.recipe import load_recipe
from epmq_deploy.recipe.paths import absolute


def link_all(folder: Path, store: Path) -> None:
    """Move every file of a folder into a store, under its hash, and leave a link in its place."""
    store.mkdir()
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        blob = store / hashlib.sha256(str(file).encode()).hexdigest()
        shutil.move(file, blob)
        file.symlink_to(blob)


@pytest.mark.parametrize("kind", ["roberta", "vit"])
def test_a_project_of_links_runs_as_one_of_files(tmp_path: Path, kind: str) -> None:
    project = tmp_path / "project"
    project.mkdir()
    models = build_tiny_models(project, ARCHITECTURES[kind])
    names = check_experts(open_sources(load_recipe(models.recipe)))
    link_all(project, tmp_path / "store")
    recipe = load_recipe(models.recipe)
    assert recipe.base.path == str(project / "base")
    sources = open_sources(recipe)
    assert check_experts(sources) == names
    merged = epmq.merge(recipe, tmp_path / "merged")
    quantized = epmq.quantize(merged, tmp_path / "quantized", method="rtn")
    exported = epmq.export(quantized, tmp_path / "exported")
    epmq.evaluate(exported)


def test_linked_folders_keep_their_own_paths(tmp_path: Path) -> None:
    models = build_tiny_text_generators(tmp_path, TEXT_GENERATORS["llama"])
    shutil.move(models.base, tmp_path / "elsewhere")
    models.base.symlink_to(tmp_path / "elsewhere")
    recipe = load_recipe(models.recipe)
    assert recipe.base.path == str(models.base)
    check_experts(open_sources(recipe))


def test_a_linked_recipe_is_seen_from_where_the_link_is(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    models = build_tiny_models(tmp_path, ARCHITECTURES["roberta"])
    shutil.move(models.recipe, tmp_path / "store" / "0a1b")
    models.recipe.symlink_to(tmp_path / "store" / "0a1b")
    assert load_recipe(models.recipe).base.path == str(models.base)


def test_dots_are_taken_away_where_no_link_changes_their_meaning(tmp_path: Path) -> None:
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "plain").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")
    assert absolute(tmp_path / "plain" / ".." / "x") == tmp_path / "x"
    assert absolute(tmp_path / "plain" / "." / "x") == tmp_path / "plain" / "x"
    through = absolute(tmp_path / "link" / ".." / "x")
    assert through == tmp_path / "link" / ".." / "x"
    assert through.resolve() == tmp_path / "far" / "x"
    assert absolute(Path("/../x")) == Path("/../x")


def test_a_cache_of_the_hub_is_a_model_folder(tmp_path: Path) -> None:
    """Snapshots are folders of links, relative ones, into ``blobs``."""
    models = build_tiny_models(tmp_path, ARCHITECTURES["vit"])
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(models.base.iterdir())):
        shutil.move(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    content = yaml.safe_load(models.recipe.read_text())
    content["base"]["path"] = str(snapshot)
    models.recipe.write_text(yaml.safe_dump(content))
    sources = open_sources(load_recipe(models.recipe))
    assert check_experts(sources)
    weight = torch.zeros(())
    for name, parameter in sources.family.load(snapshot).named_parameters():
        weight = weight + (parameter - sources.base.load(name)).abs().sum()
    assert weight == 0
    content["base"]["path"] = str(snapshot / "model.safetensors")
    models.recipe.write_text(yaml.safe_dump(content))
    assert open_sources(load_recipe(models.recipe)).base.folder == snapshot


@pytest.mark.parametrize("given", ["photos", "photos.csv", "texts.jsonl"])
def test_data_behind_links(tmp_path: Path, given: str) -> None:
    """Image folders, lists of paths next to images, and files that are told by their suffix."""
    models = build_tiny_models(tmp_path / "models", ARCHITECTURES["vit"])
    data = tmp_path / "data"
    rows = []
    for number in range(4):
        file = data / "photos" / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(file)
        rows.append(f"photos/class{number % 2}/{number}.png,{number % 2}")
    (data / "photos.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    texts = [f'{{"text": "red", "label": {number % 2}}}' for number in range(4)]
    (data / "texts.jsonl").write_text("\n".join(texts) + "\n")
    link_all(data, tmp_path / "store")
    if given == "texts.jsonl":
        models = build_tiny_models(tmp_path / "encoders", ARCHITECTURES["roberta"])
    content = yaml.safe_load(models.recipe.read_text())
    content["tasks"]["first"]["evaluation"] = {"path": f"../data/{given}"}
    models.recipe.write_text(yaml.safe_dump(content))
    source = load_recipe(models.recipe).tasks["first"].evaluation
    assert source is not None
    assert source.path == str(data / given)
    samples = load_samples("first", source, family_of(models.base))
    assert sorted(int(number) for number in samples.labels().numbers) == [0, 0, 1, 1]
