"""Damaged images are found before any work, with row and file."""

import io
import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaml
from command_line import run
from datasets import Dataset
from PIL import Image
from tiny_folder import copied
from tiny_zoo import SIZE, TinyZoo

import epmq_deploy as epmq
from epmq_deploy.data import preflight
from epmq_deploy.data.loading import data_sha256, load_samples
from epmq_deploy.data.preflight import check_images
from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.models import family_of
from epmq_deploy.recipe import DataSource, Preflight, load_recipe, with_preflight


def image_bytes(seed: int, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def damaged(file: Path, count: int, rows: tuple[int, ...]) -> Path:
    """A Parquet file of images, some of which end too early."""
    stored = [image_bytes(index) for index in range(count)]
    for row in rows:
        stored[row] = stored[row][:60]
    labels = [index % 3 for index in range(count)]
    Dataset.from_dict({"image": stored, "label": labels}).to_parquet(file)
    return file


def check(tiny: TinyZoo, file: Path, mode: Preflight) -> None:
    check_images(load_samples("t", DataSource(path=str(file)), family_of(tiny.base)), mode)


@pytest.mark.parametrize("mode", ["auto", "full"])
def test_every_damaged_image_of_small_data_is_named(
    tmp_path: Path, tiny: TinyZoo, mode: Preflight
) -> None:
    file = damaged(tmp_path / "x.parquet", 30, (17, 29))
    with pytest.raises(MismatchError) as caught:
        check(tiny, file, mode)
    assert [problem.split(" cannot")[0] for problem in caught.value.problems] == [
        f"task 't': row {row} of {file}" for row in (17, 29)
    ]


def test_some_images_of_large_data_are_decoded(
    tmp_path: Path, tiny: TinyZoo, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(preflight, "SMALL", 40)
    monkeypatch.setattr(preflight, "SAMPLED", 5)
    file = damaged(tmp_path / "x.parquet", 41, (13,))
    with caplog.at_level(logging.INFO, "epmq_deploy"):
        check(tiny, file, "auto")
    assert "decoding 5 of 41 images beforehand" in caplog.text
    check(tiny, file, "sampled")
    with pytest.raises(MismatchError, match="row 13"):
        check(tiny, file, "full")
    for row in (0, 10, 40):
        with pytest.raises(MismatchError, match=f"row {row} of"):
            check(tiny, damaged(tmp_path / "x.parquet", 41, (row,)), "auto")


def test_many_damaged_images_are_counted(tmp_path: Path, tiny: TinyZoo) -> None:
    file = damaged(tmp_path / "x.parquet", 12, tuple(range(12)))
    with pytest.raises(MismatchError) as caught:
        check(tiny, file, "full")
    assert len(caught.value.problems) == 6
    assert caught.value.problems[-1].endswith("7 more images cannot be decoded")


def test_missing_and_damaged_files_are_named(tmp_path: Path, tiny: TinyZoo) -> None:
    (tmp_path / "list.csv").write_text("image,label\na.png,0\ngone.png,1\nempty.png,0\n")
    (tmp_path / "a.png").write_bytes(image_bytes(0))
    (tmp_path / "empty.png").touch()
    with pytest.raises(MismatchError) as caught:
        check(tiny, tmp_path / "list.csv", "full")
    gone, empty = caught.value.problems
    assert "row 1 of" in gone and "(gone.png) cannot be decoded (No such file" in gone
    assert "row 2 of" in empty and "(empty.png) cannot be decoded (the file is empty" in empty


def test_links_that_lead_nowhere_are_named(tmp_path: Path, tiny: TinyZoo) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/a.png").write_bytes(image_bytes(0))
    (tmp_path / "cat/b.png").symlink_to(tmp_path / "store/gone")
    with pytest.raises(MismatchError, match=r"row 1 of .*b\.png\) cannot be decoded \(No such"):
        check(tiny, tmp_path, "full")
    data_sha256(DataSource(path=str(tmp_path)))


def test_what_is_assumed_about_images_is_counted(
    tmp_path: Path, tiny: TinyZoo, caplog: Any
) -> None:
    clear = Image.new("RGBA", (SIZE, SIZE))
    clear.putpixel((3, 3), (9, 9, 9, 255))
    (tmp_path / "cat").mkdir()
    for index in range(3):
        clear.save(tmp_path / f"cat/{index}.png")
    (tmp_path / "cat/plain.png").write_bytes(image_bytes(0))
    check(tiny, tmp_path, "full")
    assert "3 of 4 images: transparent pixels are laid on white" in caplog.text


def test_floats_of_one_data_source_have_one_range(tmp_path: Path, tiny: TinyZoo) -> None:
    """A dark image of values up to 255 would be read as one of values up to 1."""
    (tmp_path / "cat").mkdir()
    dark, bright = np.zeros((2, SIZE, SIZE), np.float32)
    bright[0, 0] = 200
    for name, values in {"black": dark, "bright": bright}.items():
        Image.fromarray(values).save(tmp_path / f"cat/{name}.tif")
    check(tiny, tmp_path, "full")
    dark[0, 0] = 1
    Image.fromarray(dark).save(tmp_path / "cat/dark.tif")
    with pytest.raises(MismatchError, match="1 images have floats up to 1, 1 up to 255"):
        check(tiny, tmp_path, "full")


def with_damaged_image(tiny: TinyZoo, folder: Path, split: str) -> Path:
    """A copy of the tiny zoo whose last image of a task is damaged; its recipe."""
    recipe = copied(tiny, folder)
    file = folder / "data/red" / f"{split}.parquet"
    rows = Dataset.from_parquet(str(file)).to_dict()
    rows["image"][-1] = {"bytes": rows["image"][-1]["bytes"][:60], "path": None}
    Dataset.from_dict(rows).to_parquet(file)
    return recipe


@pytest.mark.parametrize("split", ["calibration", "test"])
def test_a_run_ends_before_any_work(tiny: TinyZoo, tmp_path: Path, split: str) -> None:
    recipe = with_damaged_image(tiny, tmp_path / "zoo", split)
    with pytest.raises(MismatchError, match=r"task 'red': row \d+ of .* cannot be decoded"):
        epmq.run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_choice_is_a_key_a_flag_and_a_keyword(
    tiny: TinyZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(preflight, "SAMPLED", 2)
    recipe = with_damaged_image(tiny, tmp_path / "zoo", "calibration")
    merged = epmq.merge(recipe, tmp_path / "merged")
    options = {"method": "rtn", "group_size": 16}
    # Rounding reads no samples, so that nothing is decoded.
    epmq.quantize(merged, tmp_path / "rtn", preflight="full", **options)
    gptq = {"method": "gptq", "group_size": 16}
    with pytest.raises(MismatchError, match="cannot be decoded"):
        epmq.quantize(merged, tmp_path / "gptq", **gptq)
    content = yaml.safe_load(recipe.read_text())
    rows = len(Dataset.from_parquet(str(tmp_path / "zoo/data/red/calibration.parquet")))
    assert rows > 2
    arguments = [tmp_path / "merged", "-o", tmp_path / "q", "--method", "gptq", "--group-size", 16]
    assert run("quantize", *arguments, "--preflight", "full") == 3
    assert "cannot be decoded" in capsys.readouterr().err
    recipe.write_text(yaml.safe_dump(content | {"preflight": "sampled"}))
    assert load_recipe(recipe).preflight == "sampled"
    assert with_preflight(load_recipe(recipe), "full").preflight == "full"
    with pytest.raises(RecipeError, match=r"preflight.*'auto', 'full' or 'sampled'"):
        epmq.run(recipe, tmp_path / "out", preflight=cast(Preflight, "fast"))
    recipe.write_text(yaml.safe_dump(content) + "preflight:\n")
    assert load_recipe(recipe).preflight == "auto"
