"""The Python API against onnxruntime and preprocessing used by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from datasets import Image as DatasetImage
from eval_report import build_report
from PIL import Image
from tiny_text import TEXT_TASKS, TinyText
from tiny_zoo import CLASSES, TASKS, TinyZoo
from transformers import AutoTokenizer, CLIPImageProcessor

from epmq_deploy.artifacts.manifest import read_manifest
from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.exporters.stage import export
from epmq_deploy.merging.stage import merge
from epmq_deploy.quantization.stage import quantize
from epmq_deploy.recipe import Recipe, load_recipe, override
from epmq_deploy.runtime import load
from epmq_deploy.runtime.evaluation.report import Gates
from epmq_deploy.runtime.report.json_report import report_dict


def exported(recipe: Recipe, folder: Path) -> Path:
    """An export of a merged model, rounded to nearest."""
    chosen = override(recipe, "quantize", {"method": "rtn", "group_size": 16})
    merge(chosen, folder / "merged")
    quantize(chosen, folder / "merged", folder / "quantized")
    export(chosen, folder / "quantized", folder / "onnx")
    return folder / "onnx"


def graph_file(folder: Path, name: str) -> Path:
    graphs = read_manifest(folder, "export").graphs
    return folder / next(graph.file for graph in graphs if graph.format == name)


@pytest.fixture(scope="module")
def images(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(load_recipe(tiny.recipe), tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def texts(tiny_text: TinyText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(load_recipe(tiny_text.recipe), tmp_path_factory.mktemp("texts"))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    powers = np.exp(logits)
    shares: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return shares


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_images_get_the_labels_of_the_graph(images: Path, batch_size: int) -> None:
    model = load(images, format="matmulnbits", batch_size=batch_size, provider="cpu")
    found = model(list(PIXELS))
    processor = CLIPImageProcessor.from_pretrained(images)
    pixels = processor(list(PIXELS), return_tensors="np")["pixel_values"]
    session = onnxruntime.InferenceSession(graph_file(images, "matmulnbits"))
    assert set(model.tasks) == set(TASKS)
    assert len(found) == len(PIXELS)
    for task in TASKS:
        (logits,) = session.run([f"logits_{task}"], {"pixel_values": pixels})
        wanted = softmax(logits)
        for row, prediction in enumerate(item[task] for item in found):
            assert prediction.labels == tuple(str(index) for index in range(CLASSES))
            assert prediction.label == str(wanted[row].argmax())
            assert prediction.score == pytest.approx(wanted[row].max(), abs=1e-4)
            assert np.allclose(prediction.scores, wanted[row], atol=1e-4)


def test_images_may_be_files_arrays_or_pillow_s(images: Path, tmp_path: Path) -> None:
    model = load(images)
    file = tmp_path / "image.png"
    Image.fromarray(PIXELS[0]).save(file)
    several = model([file, str(file), PIXELS[0], Image.fromarray(PIXELS[0])])
    alone = [model(file), model(str(file)), model(PIXELS[0]), model(Image.fromarray(PIXELS[0]))]
    scores = [item["red"].scores for item in [*several, *alone, *model(PIXELS[:1])]]
    assert all(np.allclose(item, scores[0], atol=1e-5) for item in scores)
    gray = model(PIXELS[0][:, :, 0])
    assert np.allclose(gray["red"].scores, model(PIXELS[0][:, :, :1].repeat(3, 2))["red"].scores)
    assert model([]) == []


def test_images_are_read_the_way_up_their_camera_says(images: Path, tmp_path: Path) -> None:
    """As evaluation reads them: ``datasets`` turns what it decodes."""
    model = load(images)
    file, exif = tmp_path / "turned.png", Image.Exif()
    exif[0x0112] = 6  # Orientation: a quarter turn.
    Image.fromarray(PIXELS[0]).save(file, exif=exif)
    decoded = DatasetImage().decode_example({"path": str(file), "bytes": None})
    seen, upright = (model(item)["red"].scores for item in (np.asarray(decoded), PIXELS[0]))
    assert not np.allclose(seen, upright, atol=1e-3)
    with Image.open(file) as opened:
        found = model([file, opened])
    assert all(np.allclose(item["red"].scores, seen, atol=1e-5) for item in found)


def test_images_of_any_depth_and_mode_are_read_as_in_evaluation(
    images: Path, tmp_path: Path
) -> None:
    model = load(images)
    gray = PIXELS[0][..., 0]
    expected = model(Image.fromarray(gray).convert("RGB"))["red"].scores
    words = Image.fromarray(gray.astype(np.uint16) * 257)
    floats = Image.fromarray((gray / 255).astype(np.float32))
    for index, image in enumerate((words, floats)):
        image.save(tmp_path / f"{index}.tif")
    several = [words, floats, tmp_path / "0.tif", tmp_path / "1.tif"]
    assert all(np.allclose(each["red"].scores, expected, atol=1e-5) for each in model(several))
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "unknown.tif")
    with pytest.raises(MismatchError, match=r"input 0: .*unknown\.tif: mode I has 32-bit"):
        model(tmp_path / "unknown.tif")


def test_texts_with_halves_of_characters_are_refused(texts: Path) -> None:
    with pytest.raises(MismatchError, match=r"input 1: the text is not Unicode \(surrogates"):
        load(texts)(["red", "tree \ud83d"])


def test_texts_get_the_labels_of_the_graph(texts: Path) -> None:
    model = load(texts, format="qdq", batch_size=2)
    samples = ["red tree", "blue river sings", "green"]
    found = model(samples)
    tokenizer = AutoTokenizer.from_pretrained(texts)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(graph_file(texts, "qdq"), options)
    for text, item in zip(samples, found, strict=True):
        batch = {key: np.array(value) for key, value in tokenizer([text]).items()}
        for task in TEXT_TASKS:
            (logits,) = session.run([f"logits_{task}"], batch)
            assert np.allclose(item[task].scores, softmax(logits[0]), atol=1e-4)
    assert model("green")["tone"].label == found[2]["tone"].label


def test_only_the_tasks_asked_for(images: Path) -> None:
    model = load(images)
    assert set(model(PIXELS[0], tasks=["blue"])) == {"blue"}
    with pytest.raises(MismatchError, match="unknown task 'cars'; the model has"):
        model(PIXELS[0], tasks=["cars", "blue"])


def test_classes_have_names_where_they_are_known(images: Path, tmp_path: Path) -> None:
    for file in images.iterdir():
        (tmp_path / file.name).symlink_to(file)
    content = json.loads((images / "manifest.json").read_text())
    assert content["details"]["classes"] == dict.fromkeys(TASKS)
    content["details"]["classes"]["red"] = ["a", "b", "c"]
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    found = load(tmp_path)(PIXELS[0])
    assert found["red"].labels == ("a", "b", "c")
    assert found["red"].label == "abc"[found["red"].scores.argmax()]
    assert found["blue"].labels == ("0", "1", "2")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("none.png", "input 1: .*No such file"),
        (PIXELS[0].astype(np.float32), r"found float32 \(20, 30, 3\)"),
        (7, "expected an image, a file or an array, found int"),
    ],
)
def test_inputs_it_cannot_take_are_named(images: Path, item: object, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        load(images)([PIXELS[0], item])


def test_one_input_it_cannot_take_is_named(images: Path, texts: Path) -> None:
    for model, item in ((load(images), 3), (load(texts), None)):
        with pytest.raises(MismatchError, match=f"input 0: .*found {type(item).__name__}"):
            model(item)


def test_files_that_are_no_images_and_texts_that_are_no_texts(
    images: Path, texts: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_text("nonsense")
    with pytest.raises(MismatchError, match=r"a\.png: not an image that Pillow reads"):
        load(images)(tmp_path / "a.png")
    with pytest.raises(MismatchError, match="input 0: expected a str, found float"):
        load(texts)([1.5])


def test_unknown_formats_and_folders_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no graph of format 'gguf'; it has fp32, matmulnbits"):
        load(images, format="gguf")
    with pytest.raises(RecipeError, match="expected the output of `epmq export`"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["batch_size", "threads", "max_tokens"])
@pytest.mark.parametrize("count", [0, -2])
def test_counts_below_1_are_refused(images: Path, name: str, count: int) -> None:
    with pytest.raises(RecipeError, match=f"{name} is {count}; give 1 or more"):
        load(images, **{name: count})  # type: ignore[arg-type]


def test_options_of_writing_are_refused_where_nothing_is_written(images: Path) -> None:
    for options in ({"max_tokens": 3}, {"scores": False}):
        with pytest.raises(RecipeError, match="max_tokens and scores are for text generation"):
            load(images, **options)  # type: ignore[arg-type]


def test_takes_the_graph_that_was_recommended_and_none_where_none_was(
    images: Path, tmp_path: Path
) -> None:
    for file in images.iterdir():
        (tmp_path / file.name).symlink_to(file)
    rows = [
        replace(row, name=name)
        for row, name in zip(build_report().rows, ("experts", "fp32", "qdq"), strict=False)
    ]
    report = replace(build_report(), rows=tuple(rows))
    (tmp_path / "eval.json").write_text(json.dumps(report_dict(report)))
    scores = load(tmp_path)(PIXELS[0])["red"].scores
    assert np.array_equal(scores, load(images, format="qdq")(PIXELS[0])["red"].scores)
    (tmp_path / "eval.json").write_text(
        json.dumps(report_dict(replace(report, gates=Gates(max_size=1))))
    )
    with pytest.raises(RecipeError, match=r"eval\.json: no low-bit graph to deploy.*format="):
        load(tmp_path)
    (tmp_path / "eval.json").write_text('{"rows": [')
    with pytest.raises(RecipeError, match=r"eval\.json is damaged.*overwrite it, or .*format="):
        load(tmp_path)
    assert load(tmp_path, format="qdq").tasks == load(images).tasks


def test_takes_a_low_bit_graph_where_nothing_was_evaluated(images: Path) -> None:
    names = load(images), load(images, format="fp32")
    low, fp32 = (model(PIXELS[0])["red"].scores for model in names)
    assert np.array_equal(low, load(images, format="matmulnbits")(PIXELS[0])["red"].scores)
    assert not np.array_equal(low, fp32)
