"""Loading samples in every form users keep them."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from PIL import Image
from tiny_text import TinyText
from tiny_zoo import TinyZoo

from epmq_deploy.data.loading import data_sha256, load_samples
from epmq_deploy.data.samples import batches
from epmq_deploy.errors import RecipeError
from epmq_deploy.models import ModelFamily, family_of
from epmq_deploy.recipe import DataSource

COUNT = 6


@pytest.fixture
def family(tiny: TinyZoo) -> ModelFamily:
    """CLIP."""
    return family_of(tiny.base)


def pictures() -> list[Image.Image]:
    """Six small images, all different."""
    rng = np.random.default_rng(7)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(COUNT)]


def png(image: Image.Image) -> bytes:
    """An image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def image_folder(folder: Path) -> Path:
    """Two classes by folder name."""
    for index, image in enumerate(pictures()):
        target = folder / "images" / ("cat" if index < 3 else "dog")
        target.mkdir(parents=True, exist_ok=True)
        image.save(target / f"{index}.png")
    return folder / "images"


def csv_with_paths(folder: Path) -> Path:
    """A CSV that lists files beside it."""
    lines = ["image,label"]
    for index, image in enumerate(pictures()):
        image.save(folder / f"{index}.png")
        lines.append(f"{index}.png,{int(index >= 3)}")
    (folder / "list.csv").write_text("\n".join(lines))
    return folder / "list.csv"


def json_with_paths(folder: Path) -> Path:
    """The same as JSON lines."""
    csv_with_paths(folder)
    rows = [{"image": f"{index}.png", "label": int(index >= 3)} for index in range(COUNT)]
    (folder / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder / "list.jsonl"


def parquet_with_bytes(folder: Path) -> Path:
    """Encoded images without any image type."""
    rows = {
        "image": [png(image) for image in pictures()],
        "label": [int(index >= 3) for index in range(COUNT)],
    }
    Dataset.from_dict(rows).to_parquet(folder / "raw.parquet")
    return folder / "raw.parquet"


def saved_dataset(folder: Path) -> Path:
    """What ``save_to_disk`` writes."""
    load_dataset("parquet", data_files=str(parquet_with_bytes(folder)))["train"].save_to_disk(
        str(folder / "saved")
    )
    return folder / "saved"


@pytest.mark.parametrize(
    "make", [image_folder, csv_with_paths, json_with_paths, parquet_with_bytes, saved_dataset]
)
def test_every_kind_of_source_gives_the_same_samples(
    tmp_path: Path, tiny: TinyZoo, family: ModelFamily, make: Callable[[Path], Path]
) -> None:
    samples = load_samples("t", DataSource(path=str(make(tmp_path))), family)
    (inputs,) = batches(samples, family, tiny.base, 10)
    assert torch.equal(inputs[0], family.collate(tiny.base, pictures())[0])
    assert samples.labels().numbers == [0, 0, 0, 1, 1, 1]


def test_the_family_says_which_column_holds_the_inputs(
    tmp_path: Path, family: ModelFamily, tiny_text: TinyText
) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "red", "sentence": "blue", "label": 0}\n')
    path = str(tmp_path / "x.jsonl")
    texts = family_of(tiny_text.base)
    assert load_samples("t", DataSource(path=path), texts).inputs(0, 1) == ["red"]
    named = DataSource(path=path, input_column="sentence")
    assert load_samples("t", named, texts).inputs(0, 1) == ["blue"]
    with pytest.raises(RecipeError, match="no column 'image'; it has text, sentence, label"):
        load_samples("t", DataSource(path=path), family)


def test_a_limit_draws_from_all_classes_and_depends_on_the_seed(
    tmp_path: Path, family: ModelFamily
) -> None:
    source = DataSource(path=str(image_folder(tmp_path)))
    drawn = [load_samples("t", source, family, limit=4, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0].indices == drawn[1].indices
    assert drawn[0].indices != drawn[2].indices
    assert set(drawn[0].labels().numbers) == {0, 1}


def test_a_broken_image_is_named_by_task_and_row(
    tmp_path: Path, tiny: TinyZoo, family: ModelFamily
) -> None:
    content = [png(image) for image in pictures()]
    content[4] = content[4][:50]
    Dataset.from_dict({"image": content, "label": [0] * COUNT}).to_parquet(tmp_path / "x.parquet")
    samples = load_samples("cars", DataSource(path=str(tmp_path / "x.parquet")), family)
    with pytest.raises(RecipeError, match=r"task 'cars': row 4 of .* cannot be decoded"):
        list(batches(samples, family, tiny.base, 3))


@pytest.mark.parametrize("labels", [[0.0, 0.7, 1.0], [0, None, 1]])
def test_labels_must_be_integers(tmp_path: Path, family: ModelFamily, labels: list[object]) -> None:
    rows = {"image": [png(image) for image in pictures()[:3]], "label": labels}
    Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")
    samples = load_samples("t", DataSource(path=str(tmp_path / "x.parquet")), family)
    with pytest.raises(RecipeError, match="must hold whole numbers"):
        samples.labels()


def test_splits_are_chosen_by_name_and_listed_when_wrong(
    tmp_path: Path, family: ModelFamily
) -> None:
    rows = {"image": [png(image) for image in pictures()], "label": [0] * COUNT}
    both = DatasetDict(train=Dataset.from_dict(rows), test=Dataset.from_dict(rows).select([0]))
    both.save_to_disk(str(tmp_path / "both"))
    path = str(tmp_path / "both")
    assert len(load_samples("t", DataSource(path=path, split="test"), family)) == 1
    for wrong in (None, "tset"):
        with pytest.raises(RecipeError, match="name one of train, test"):
            load_samples("t", DataSource(path=path, split=wrong), family)
    single = str(saved_dataset(tmp_path))
    with pytest.raises(RecipeError, match="has no splits"):
        load_samples("t", DataSource(path=single, split="test"), family)


def test_what_cannot_be_loaded_is_explained(tmp_path: Path, family: ModelFamily) -> None:
    (tmp_path / "x.npz").write_bytes(b"1")
    (tmp_path / "x.parquet").write_bytes(b"nonsense")
    for name, message in (
        ("none.parquet", "no such file"),
        ("x.npz", "unknown kind of file"),
        ("x.parquet", "cannot be loaded"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_samples("t", DataSource(path=str(tmp_path / name)), family)


def test_the_hash_tells_sources_apart(tmp_path: Path) -> None:
    assert data_sha256(DataSource(path="a/b")) != data_sha256(DataSource(path="c/d"))
    folder = image_folder(tmp_path)
    before = data_sha256(DataSource(path=str(folder)))
    assert data_sha256(DataSource(path=str(folder), label_column=None)) != before
    (folder / "dog").rename(folder / "wolf")
    assert data_sha256(DataSource(path=str(folder))) != before
    (folder / "wolf").rename(folder / "dog")
    assert data_sha256(DataSource(path=str(folder))) == before
