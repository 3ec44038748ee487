"""Images that a table lists by their paths are part of what identifies the data."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from epmq_deploy.data.listed_images import listed_images
from epmq_deploy.data.loading import data_sha256
from epmq_deploy.recipe import DataSource

PATHS = ["images/a.png", "images/b.png", "images/a.png"]


def table(folder: Path, kind: str) -> DataSource:
    """A table of that kind with paths and labels."""
    file = folder / f"rows.{kind}"
    rows = [{"image": path, "label": number} for number, path in enumerate(PATHS)]
    if kind == "csv":
        file.write_text("image,label\n" + "".join(f"{r['image']},{r['label']}\n" for r in rows))
    elif kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        file.write_text(json.dumps({"data": rows}))
    else:
        Dataset.from_list(rows).to_parquet(file)
    return DataSource(path=str(file))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_a_changed_image_is_other_data(tmp_path: Path, kind: str) -> None:
    (tmp_path / "images").mkdir()
    for name, value in (("a", 10), ("b", 200), ("c", 7)):
        Image.new("RGB", (4, 4), (value, 0, 0)).save(tmp_path / "images" / f"{name}.png")
    source = table(tmp_path, kind)
    assert listed_images(source) == [tmp_path / "images" / "a.png", tmp_path / "images" / "b.png"]
    before = data_sha256(source)
    Image.new("RGB", (4, 4), (8, 0, 0)).save(tmp_path / "images" / "c.png")
    assert data_sha256(source) == before
    Image.new("RGB", (4, 4), (201, 0, 0)).save(tmp_path / "images" / "b.png")
    assert data_sha256(source) != before


def test_texts_list_nothing(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(b"x")
    (tmp_path / "x.csv").write_text("text,label\nred,0\na .png file,1\n" + "x" * 5000 + ",1\n")
    assert listed_images(DataSource(path=str(tmp_path / "x.csv"))) == []
