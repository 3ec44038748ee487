"""Image folders: which images, labels and splits a folder holds."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from epmq_deploy.data.rows import load_rows
from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import DataSource


def write(folder: Path, *names: str) -> Path:
    """A small image for each name, all different."""
    for index, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
    return folder


def loaded(folder: Path, split: str | None = None) -> dict[str, str]:
    """Class of every image that is loaded, by its path in the folder."""
    rows = load_rows("t", DataSource(path=str(folder), split=split)).with_format("arrow")[:]
    rows = rows.to_pydict()
    paths = [os.path.relpath(image["path"], folder) for image in rows["image"]]
    names = load_rows("t", DataSource(path=str(folder), split=split)).features["label"].names
    return {path: names[label] for path, label in zip(paths, rows["label"], strict=True)}


def test_plain_folders_load_as_datasets_loads_them(tmp_path: Path) -> None:
    write(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog", "Ant") for i in range(12)))
    reference = load_dataset("imagefolder", data_dir=str(tmp_path), split="train")
    rows = load_rows("t", DataSource(path=str(tmp_path)))
    assert rows.features["label"].names == reference.features["label"].names
    assert rows["label"] == reference["label"]
    assert all(
        np.array_equal(np.asarray(mine), np.asarray(other))
        for mine, other in zip(rows["image"], reference["image"], strict=True)
    )


@pytest.mark.parametrize(
    "name",
    [
        "cat/crash-test-1.png",
        "cat/train.png",
        "cat/val/1.png",
        "train/1.png",
        "test/1.png",
        "evaluation form/1.png",
        "dev-set/1.png",
        "__background__/1.png",
        ".hidden/1.png",
        "cat/.1.png",
        "cat/__1__.png",
        "cat/1.PNG",
        "cat/1.JPeG",
        "cat/n01440764",
        "cat/1.png.1",
        "cat/a b [c] * ?.png",
        "cat/deeper/and/deeper/1.png",
        "kät zchen 🐈/ünï 🐕.png",
    ],
)
def test_every_image_of_every_class_folder_is_loaded(tmp_path: Path, name: str) -> None:
    write(tmp_path, "cat/plain.png", "dog/1.png", "dog/2.png", name)
    assert loaded(tmp_path) == {
        "cat/plain.png": "cat",
        "dog/1.png": "dog",
        "dog/2.png": "dog",
        name: name.split("/")[0],
    }


def test_names_that_are_not_unicode_are_loaded(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "dog/1.png")
    odd = os.fsencode(tmp_path / "dog") + b"/caf\xe9.png"
    (tmp_path / "dog/1.png").rename(os.fsdecode(odd))
    rows = load_rows("t", DataSource(path=str(tmp_path)))
    assert rows["label"] == [0, 1]
    assert rows["image"][1].size == (4, 4)


def test_a_class_without_images_keeps_its_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "ant/1.png", "cow/1.png")
    (tmp_path / "bee").mkdir()
    rows = load_rows("t", DataSource(path=str(tmp_path)))
    assert rows.features["label"].names == ["ant", "bee", "cow"]
    assert rows["label"] == [0, 2]
    assert "no images of class bee" in caplog.text


def test_what_is_left_out_is_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "cat/1.png", "dog/1.png", "cover.png", ".ipynb_checkpoints/1.png")
    (tmp_path / "cat/._1.png").write_bytes(b"\x00\x05\x16\x07rest")
    (tmp_path / "cat/notes.txt").write_text("hello")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/1.xml").write_text("<a/>")
    assert loaded(tmp_path) == {"cat/1.png": "cat", "dog/1.png": "dog"}
    assert (
        "loading 2 image(s); left out: 1 image(s) outside its class folders (cover.png); 2 file(s) "
        "that are not images (1 .txt, 1 .xml); 2 that programs left there" in caplog.text
    )


def test_nothing_is_said_where_nothing_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "cat/1.png", "dog/1.png")
    with caplog.at_level(logging.INFO, "epmq_deploy"):
        loaded(tmp_path)
    assert not caplog.records


def test_splits_are_folders_of_class_folders(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.png", "train/dog/1.png", "Val/cat/2.png", "Val/dog/test-3.png")
    assert loaded(tmp_path, "train") == {"train/cat/1.png": "cat", "train/dog/1.png": "dog"}
    assert loaded(tmp_path, "Val") == {"Val/cat/2.png": "cat", "Val/dog/test-3.png": "dog"}
    for wrong in (None, "test"):
        with pytest.raises(RecipeError, match="name one of Val, train as split"):
            loaded(tmp_path, wrong)


def test_the_only_split_is_taken(tmp_path: Path) -> None:
    write(tmp_path, "test/cat/1.png", "test/dog/1.png")
    assert loaded(tmp_path) == {"test/cat/1.png": "cat", "test/dog/1.png": "dog"}


def test_folders_with_names_of_splits_that_hold_images_are_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "train/1.png", "test/1.png")
    assert loaded(tmp_path) == {"test/1.png": "test", "train/1.png": "train"}
    assert "taking its folders test, train for classes" in caplog.text
    alone = load_rows("t", DataSource(path=str(tmp_path), split="train"))
    assert alone.column_names == ["image"]
    assert len(alone) == 1


def test_any_folder_of_class_folders_can_be_named_as_split(tmp_path: Path) -> None:
    write(tmp_path, "fold 1/cat/1.png", "fold 1/dog/1.png", "fold 2/cat/1.png")
    assert loaded(tmp_path, "fold 1") == {"fold 1/cat/1.png": "cat", "fold 1/dog/1.png": "dog"}


def test_a_class_folder_is_no_split(tmp_path: Path) -> None:
    write(tmp_path, "train/1.png", "bus/1.png")
    with pytest.raises(RecipeError, match="next to the class folders bus, so it is a class"):
        loaded(tmp_path, "train")
    with pytest.raises(RecipeError, match="has no splits"):
        loaded(tmp_path, "test")
    # What ``datasets`` calls data without splits.
    write(tmp_path / "other", "car/1.png", "bus/1.png")
    assert len(loaded(tmp_path / "other", "train")) == 2


def test_one_folder_around_the_class_folders_is_entered(tmp_path: Path) -> None:
    write(tmp_path, "images/cat/1.png", "images/dog/1.png")
    assert set(loaded(tmp_path).values()) == {"cat", "dog"}


def test_two_levels_that_could_both_be_classes_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "animals/cat/1.png", "animals/dog/1.png", "cars/bus/1.png", "cars/van/1.png")
    message = r"animals/cat, animals/dog, cars/bus and 1 more\).*not clear which are the classes"
    with pytest.raises(RecipeError, match=message):
        loaded(tmp_path)


def test_images_alone_have_no_labels(tmp_path: Path) -> None:
    write(tmp_path, "test-1.png", "train-2.png", "3.png")
    rows = load_rows("t", DataSource(path=str(tmp_path)))
    assert (len(rows), rows.column_names) == (3, ["image"])


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    write(tmp_path, "store/abc.png", "data/dog/1.png")
    (tmp_path / "data/cat").mkdir()
    (tmp_path / "data/cat/1.png").symlink_to(tmp_path / "store/abc.png")
    (tmp_path / "data/cat/again").symlink_to(tmp_path / "data/cat")
    (tmp_path / "data/cow").symlink_to(tmp_path / "store")
    assert loaded(tmp_path / "data") == {
        "cat/1.png": "cat",
        "dog/1.png": "dog",
        "cow/abc.png": "cow",
    }


def test_metadata_say_what_belongs_to_an_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "a-test.png", "sub/b-train.png", "c.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\nsub/b-train.png,1\na-test.png,0\n")
    rows = load_rows("t", DataSource(path=str(tmp_path)))
    assert rows["label"] == [1, 0]
    assert [image.size for image in rows["image"]] == [(4, 4)] * 2
    assert "left out: 1 image(s) not listed in its metadata (c.png)" in caplog.text
    (tmp_path / "metadata.csv").write_text("file,label\nc.png,1\n")
    with pytest.raises(RecipeError, match=r"no column 'file_name'.* it has file, label"):
        load_rows("t", DataSource(path=str(tmp_path)))


def test_data_files_next_to_an_image_stay_data(tmp_path: Path) -> None:
    write(tmp_path, "assets/picture.png")
    (tmp_path / "data.csv").write_text("text,label\nhello,1\n")
    assert load_rows("t", DataSource(path=str(tmp_path)))["label"] == [1]


def test_annotations_next_to_each_image_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "dog/1.png")
    for name in ("cat", "dog"):
        (tmp_path / name / "1.json").write_text("{}")
    assert loaded(tmp_path) == {"cat/1.png": "cat", "dog/1.png": "dog"}
