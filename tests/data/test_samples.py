"""Loading samples in every form users keep them."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets import Image as DatasetImage
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


def test_the_hash_follows_links_and_takes_names_of_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    folder = image_folder(tmp_path)
    (folder / "cow").symlink_to(tmp_path / "store")
    pictures()[0].save(tmp_path / "store/1.png")
    (folder / "dog/3.png").rename(os.fsdecode(os.fsencode(folder / "dog") + b"/caf\xe9.png"))
    before = data_sha256(DataSource(path=str(folder)))
    pictures()[1].save(tmp_path / "store/1.png")
    assert data_sha256(DataSource(path=str(folder))) != before
    before = data_sha256(DataSource(path=str(folder)))
    (folder / ".DS_Store").write_bytes(b"left by a program")
    assert data_sha256(DataSource(path=str(folder))) == before


def image_rows(kind: object, values: list[object], file: Path) -> str:
    """A Parquet file without any metadata of ``datasets``, as others write them."""
    columns = {"image": pa.array(values, kind), "label": pa.array([0] * len(values))}
    pq.write_table(pa.table(columns), file)
    return str(file)


@pytest.mark.parametrize("content", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("path", [pa.string(), pa.large_string(), pa.null(), None])
def test_structs_of_bytes_and_path_are_images(
    tmp_path: Path,
    tiny: TinyZoo,
    family: ModelFamily,
    content: pa.DataType,
    path: pa.DataType | None,
) -> None:
    fields = [("bytes", content), *([("path", path)] if path is not None else [])]
    name = None if path is None or path == pa.null() else "x.png"
    values = [{"bytes": png(image), "path": name} for image in pictures()]
    file = image_rows(pa.struct(fields), values, tmp_path / "x.parquet")
    samples = load_samples("t", DataSource(path=file), family)
    (inputs,) = batches(samples, family, tiny.base, 10)
    assert torch.equal(inputs[0], family.collate(tiny.base, pictures())[0])


def test_structs_of_paths_are_images(tmp_path: Path, tiny: TinyZoo, family: ModelFamily) -> None:
    pictures()[0].save(tmp_path / "a.png")
    kind = pa.struct([("path", pa.string())])
    file = image_rows(kind, [{"path": "a.png"}], tmp_path / "x.parquet")
    (image,) = load_samples("t", DataSource(path=file), family).inputs(0, 1)
    assert np.array_equal(np.asarray(image), np.asarray(pictures()[0]))


def test_structs_of_something_else_are_refused(tmp_path: Path, family: ModelFamily) -> None:
    for fields in ([("bytes", pa.int64())], [("bytes", pa.binary()), ("mask", pa.binary())]):
        value = {name: b"" if kind == pa.binary() else 1 for name, kind in fields}
        file = image_rows(pa.struct(fields), [value], tmp_path / "x.parquet")
        with pytest.raises(RecipeError, match="expected images, encoded bytes or paths"):
            load_samples("t", DataSource(path=file), family)


def empty_in_parquet(folder: Path) -> str:
    stored = [None if index in (2, 4) else png(image) for index, image in enumerate(pictures())]
    return image_rows(pa.binary(), list(stored), folder / "x.parquet")


def empty_struct_in_parquet(folder: Path) -> str:
    stored: list[object] = [{"bytes": png(image), "path": None} for image in pictures()]
    stored[2], stored[4] = {"bytes": None, "path": None}, None
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return image_rows(kind, stored, folder / "x.parquet")


def empty_in_csv(folder: Path) -> str:
    lines = csv_with_paths(folder).read_text().splitlines()
    lines[3], lines[5] = ",0", ",1"
    (folder / "list.csv").write_text("\n".join(lines))
    return str(folder / "list.csv")


def empty_in_json(folder: Path) -> str:
    lines = json_with_paths(folder).read_text().splitlines()
    lines[2], lines[4] = '{"image": "", "label": 0}', '{"image": null, "label": 0}'
    (folder / "list.jsonl").write_text("\n".join(lines))
    return str(folder / "list.jsonl")


@pytest.mark.parametrize(
    "make", [empty_in_parquet, empty_struct_in_parquet, empty_in_csv, empty_in_json]
)
def test_rows_without_an_image_are_named(
    tmp_path: Path, family: ModelFamily, make: Callable[[Path], str]
) -> None:
    path = make(tmp_path)
    with pytest.raises(
        RecipeError, match=r"task 't': .*: row 2 holds no image .*, like 1 more rows"
    ):
        load_samples("t", DataSource(path=path), family)


def test_images_of_other_columns_are_not_read(tmp_path: Path, family: ModelFamily) -> None:
    rows = Dataset.from_dict({"image": [png(pictures()[0])], "mask": [b"nonsense"]})
    rows.cast_column("mask", DatasetImage()).to_parquet(tmp_path / "x.parquet")
    samples = load_samples("t", DataSource(path=str(tmp_path / "x.parquet")), family)
    assert samples.inputs(0, 1)[0].size == (16, 16)


@pytest.mark.parametrize("kind", ["parquet", "folder", "csv"])
def test_every_depth_and_mode_gives_the_inputs_of_8_bit_rgb(
    tmp_path: Path, tiny: TinyZoo, family: ModelFamily, kind: str
) -> None:
    """What the base's processor makes of the same picture in plain 8-bit RGB."""
    gray = np.random.default_rng(1).integers(0, 256, (16, 20), np.uint8)
    upright, turned = Image.fromarray(gray).convert("RGB"), Image.Exif()
    turned[0x0112] = 6
    with_alpha = upright.copy()
    with_alpha.putalpha(255)
    files = {
        "words.png": (Image.fromarray(gray.astype(np.uint16) * 257), {}),
        "words.tif": (Image.fromarray(gray.astype(np.uint16) * 257), {}),
        "floats.tif": (Image.fromarray((gray / 255).astype(np.float32)), {}),
        "gray.png": (Image.fromarray(gray), {}),
        "alpha.png": (with_alpha, {}),
        "turned.png": (upright.rotate(90, expand=True), {"exif": turned}),
        "pages.tif": (upright, {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}),
    }
    (tmp_path / "images/cat").mkdir(parents=True)
    for name, (image, options) in files.items():
        image.save(tmp_path / "images/cat" / name, **options)
    if kind == "folder":
        path = tmp_path / "images"
    elif kind == "csv":
        path = tmp_path / "images/cat/list.csv"
        path.write_text("image,label\n" + "".join(f"{name},0\n" for name in files))
    else:
        path = tmp_path / "x.parquet"
        content = [(tmp_path / "images/cat" / name).read_bytes() for name in files]
        Dataset.from_dict({"image": content}).to_parquet(path)
    samples = load_samples("t", DataSource(path=str(path)), family)
    (inputs,) = batches(samples, family, tiny.base, 10)
    (wanted,) = family.collate(tiny.base, [upright])
    assert len(inputs[0]) == len(files)
    assert all(torch.equal(each, wanted[0]) for each in inputs[0])


def test_a_mode_without_a_known_range_is_named_with_its_file(
    tmp_path: Path, family: ModelFamily
) -> None:
    (tmp_path / "cat").mkdir()
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "cat/a.tif")
    samples = load_samples("t", DataSource(path=str(tmp_path)), family)
    with pytest.raises(RecipeError, match=r"row 0 of .*cat/a\.tif\).*mode I has 32-bit integers"):
        samples.inputs(0, 1)
