"""``epmq export --demo``: the page gives the answers that Python gives."""

import base64
import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from command_line import run
from PIL import Image
from served_page import SOFTWARE_WEBGPU, browser, run_in_page
from tiny_text import TEXT_TASKS, TinyText, build_tiny_text
from tiny_zoo import CLASSES, TASKS, TinyZoo

from epmq_deploy.errors import RecipeError
from epmq_deploy.exporters.browser.page import (
    check_demo,
    check_demo_model,
    default_libraries,
    image_settings,
)
from epmq_deploy.models import family_of
from epmq_deploy.models.encoders.clip import FAMILY
from epmq_deploy.models.problem_types import REGRESSION, SINGLE_LABEL
from epmq_deploy.recipe import ExportOptions, Recipe

PINNED = {"onnxruntime-web": "1.30.0", "@huggingface/tokenizers": "0.2.0"}
TEXTS = ["red tree", "Blue RIVERS, sings!", "unknown words", "trees sleeps " * 30]


def quantized(recipe: Path, folder: Path) -> Path:
    assert run("merge", recipe, "-o", folder / "merged", "-q") == 0
    options = ["--method", "rtn", "--group-size", "16", "-q"]
    assert run("quantize", folder / "merged", "-o", folder / "quantized", *options) == 0
    return folder / "quantized"


@pytest.fixture(scope="module")
def images_model(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny CLIP, quantized."""
    return quantized(tiny.recipe, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def texts_model(tiny_text: TinyText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT, quantized."""
    return quantized(tiny_text.recipe, tmp_path_factory.mktemp("texts"))


def demo_recipe(**task: object) -> Recipe:
    """One task, and a page that runs it."""
    return Recipe.model_validate(
        {
            "base": {"path": "base"},
            "tasks": {"tone": {"expert": "expert"} | task},
            "export": {"target": "wasm", "demo": True},
        }
    )


def test_tasks_on_pairs_of_texts_have_no_page() -> None:
    source = {"path": "x.csv", "input_columns": ["premise", "hypothesis"]}
    with pytest.raises(RecipeError, match="one field for a text, and tone reads pairs"):
        check_demo(demo_recipe(evaluation=source), FAMILY)


@pytest.fixture
def libraries() -> Path:
    """What the page needs; skips where it is not installed."""
    try:
        check_demo(demo_recipe(), FAMILY)
    except RecipeError as error:
        pytest.skip(f"`make web` was not run: {error}")
    return default_libraries()


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """Files of the right names and versions that do nothing."""
    for name, version in PINNED.items():
        folder = tmp_path / "web" / "node_modules" / name
        (folder / "dist").mkdir(parents=True)
        (folder / "package.json").write_text(json.dumps({"version": version}))
    runtime = tmp_path / "web" / "node_modules" / "onnxruntime-web" / "dist"
    for name in (
        *("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
        *("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs"),
        "ort-wasm-simd-threaded.asyncify.wasm",
    ):
        (runtime / name).touch()
    tokenizers = tmp_path / "web" / "node_modules" / "@huggingface" / "tokenizers" / "dist"
    (tokenizers / "tokenizers.min.mjs").touch()
    return tmp_path / "web"


MATMULNBITS = ("--formats", "matmulnbits")


def export(model: Path, target: str, out: Path, *flags: object) -> Path:
    """An export with a page, of the target's formats where flags name none."""
    assert run("export", model, "-o", out, "--target", target, "--demo", "-q", *flags) == 0
    return out


def python_logits(folder: Path, samples: list[Any]) -> list[dict[str, list[float]]]:
    """Of the page's graph, each sample by itself."""
    graph = json.loads((folder / "demo" / "settings.json").read_text())["graph"]
    session = onnxruntime.InferenceSession(folder / "demo" / graph)
    family = family_of(folder)
    names = [item.name for item in session.get_inputs()]
    outputs = [item.name for item in session.get_outputs() if item.name.startswith("logits_")]
    found = []
    for sample in samples:
        inputs = family.collate(folder, [sample])
        feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        values = session.run(outputs, feed)
        found.append(
            {
                name.removeprefix("logits_"): value[0].tolist()
                for name, value in zip(outputs, values, strict=True)
            }
        )
    return found


def page_logits(folder: Path, profile: Path, inputs: str, *flags: str) -> list[Any]:
    """What the page makes of a JavaScript list of inputs, first checking that it shows answers."""
    script = f"""
      const {{ loadClassifier }} = await import("/demo/classifier.js");
      const classifier = await loadClassifier(new URL("/demo/settings.json", location));
      const found = [];
      for (const input of {inputs}) {{
        const logits = Object.entries(await classifier.logits(input));
        const answers = await classifier.classify(input);
        found.push({{
          logits: Object.fromEntries(logits.map(([name, values]) => [name, Array.from(values)])),
          answers: Object.fromEntries(answers.map(({{ task, label }}) => [task, label])),
        }});
      }}
      await report(found);
    """
    found: list[Any] = run_in_page(folder, script, profile, *flags)
    return found


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Wide, small, a bit high and the model's own size; waves, so that resampling matters."""
    made = []
    for width, height in sizes or ((61, 40), (16, 16), (9, 12), (40, 61)):
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x / 2 + c) * np.cos(y / 3 - c) + np.sin(x * y / 40) for c in range(3)]
        made.append(Image.fromarray((np.stack(waves, -1) * 60 + 128).astype(np.uint8)))
    return made


def as_javascript(images: list[Image.Image]) -> str:
    """Blobs of PNG."""
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    urls = json.dumps([f"data:image/png;base64,{text}" for text in encoded])
    return f"await Promise.all({urls}.map(async (url) => (await fetch(url)).blob()))"


def test_pixels_are_pillows(tiny: TinyZoo, tmp_path: Path) -> None:
    """To the bit, but for high images, where Pillow resamples rows first and rounds once before."""
    browser()
    page = files("epmq_deploy.exporters.browser") / "web" / "images.js"
    images = [*pictures(), *pictures((33, 90))]
    settings = json.dumps(image_settings(tiny.base))
    (tmp_path / "images.js").write_bytes(page.read_bytes())
    script = f"""
      const {{ pixelValues }} = await import("/images.js");
      const values = [];
      for (const image of {as_javascript(images)}) {{
        values.push(Array.from((await pixelValues(image, {settings})).data));
      }}
      await report(values);
    """
    found = run_in_page(tmp_path, script, tmp_path / "profile", "--disable-gpu")
    level = 1 / 255 / 0.5
    for picture, values in zip(images, found, strict=True):
        (expected,) = family_of(tiny.base).collate(tiny.base, [picture])
        high = picture.height > 2 * picture.width
        difference = np.abs(np.array(values) - expected.numpy().ravel()).max()
        assert difference < (1.01 if high else 0.01) * level


@pytest.mark.parametrize(
    ("target", "formats", "file", "off"),
    [
        # Pixels differ by a hundredth of a level, and so some activations by one in int8.
        ("wasm", (), "model_quantized.onnx", 0.04),
        ("wasm", MATMULNBITS, "model_q4.onnx", 1e-3),
        ("webgpu", MATMULNBITS, "model_q4.onnx", 1e-3),
    ],
)
def test_images_in_the_browser(
    images_model: Path,
    libraries: Path,
    tmp_path: Path,
    target: str,
    formats: tuple[str, ...],
    file: str,
    off: float,
) -> None:
    browser()
    out = export(images_model, target, tmp_path / "out", "--demo-libraries", libraries, *formats)
    assert json.loads((out / "demo" / "settings.json").read_text())["graph"].endswith(f"/{file}")
    flags = SOFTWARE_WEBGPU if target == "webgpu" else ("--disable-gpu",)
    found = page_logits(out, tmp_path / "profile", as_javascript(pictures()), *flags)
    expected = python_logits(out, pictures())
    assert len(found) == len(expected)
    for page, python in zip(found, expected, strict=True):
        for task in TASKS:
            assert np.allclose(page["logits"][task], python[task], atol=off)
            assert page["answers"][task] == f"class {int(np.argmax(python[task]))}"
    spread = np.std([list(python.values()) for python in expected], axis=0).max()
    assert spread > 0.2, "all pictures look the same"


@pytest.mark.parametrize("formats", [(), MATMULNBITS])
def test_texts_in_the_browser(
    texts_model: Path, libraries: Path, tmp_path: Path, formats: tuple[str, ...]
) -> None:
    browser()
    out = export(texts_model, "wasm", tmp_path / "out", "--demo-libraries", libraries, *formats)
    found = page_logits(out, tmp_path / "profile", json.dumps(TEXTS), "--disable-gpu")
    expected = python_logits(out, TEXTS)
    for page, python in zip(found, expected, strict=True):
        for task in TEXT_TASKS:
            assert np.allclose(page["logits"][task], python[task], atol=1e-3)
            assert page["answers"][task] == f"class {int(np.argmax(python[task]))}"


def test_the_page_itself(images_model: Path, libraries: Path, tmp_path: Path) -> None:
    """Someone picks a file and reads the table."""
    browser()
    flags = ["--demo-libraries", libraries, *MATMULNBITS]
    out = export(images_model, "wasm", tmp_path / "out", *flags)
    script = f"""
      const frame = document.createElement("iframe");
      frame.src = "/demo/index.html";
      document.body.append(frame);
      const until = async (happened) => {{
        while (!happened()) await new Promise((done) => setTimeout(done, 50));
      }};
      const find = (selector) => frame.contentDocument?.querySelector(selector);
      await until(() => /ready|rror/.test(find("#status")?.textContent));
      const ready = find("#status").textContent;
      const [blob] = {as_javascript(pictures())};
      const chosen = new frame.contentWindow.DataTransfer();
      chosen.items.add(new File([blob], "picture.png", {{ type: "image/png" }}));
      find("input").files = chosen.files;
      find("input").dispatchEvent(new Event("change"));
      await until(() => !find("table").hidden);
      const rows = [...find("tbody").rows].map((row) => [...row.cells].map((c) => c.textContent));
      await report({{ ready, rows, shown: !find("img").hidden, text: find("#text").hidden }});
    """
    found = run_in_page(out, script, tmp_path / "profile", "--disable-gpu")
    assert found["ready"] == "ready, on wasm"
    assert (found["shown"], found["text"]) == (True, True)
    (python,) = python_logits(out, pictures()[:1])
    for task, label, percent in found["rows"]:
        powers = np.exp(np.array(python[task]) - max(python[task]))
        assert label == f"class {int(powers.argmax())}"
        assert float(percent.removesuffix(" %")) == pytest.approx(
            100 * powers.max() / powers.sum(), abs=0.2
        )
    assert {row[0] for row in found["rows"]} == set(TASKS)


def test_what_is_written(images_model: Path, stand_ins: Path, tmp_path: Path) -> None:
    flags = ["--demo-libraries", stand_ins, *MATMULNBITS]
    out = export(images_model, "webgpu", tmp_path / "out", *flags)
    settings = json.loads((out / "demo" / "settings.json").read_text())
    assert (out / "demo" / settings["graph"]).resolve() == out.resolve() / "onnx" / "model_q4.onnx"
    assert (out / "demo" / settings["library"]).is_file()
    assert {file.name for file in (out / "demo" / "vendor").iterdir()} == {
        "ort.webgpu.min.mjs",
        "ort-wasm-simd-threaded.asyncify.mjs",
        "ort-wasm-simd-threaded.asyncify.wasm",
    }
    assert [task["name"] for task in settings["tasks"]] == sorted(TASKS)
    assert settings["session_config"]["session"]["qdq_matmulnbits_accuracy_level"] == "0"
    outputs = json.loads((out / "manifest.json").read_text())["outputs"]
    assert {"demo/index.html", "demo/settings.json", "onnx/model_q4.onnx"} <= outputs.keys()
    assert CLASSES == 3


def test_experts_name_their_classes(stand_ins: Path, tmp_path: Path) -> None:
    models = build_tiny_text(tmp_path)
    task, count = next(iter(TEXT_TASKS.items()))
    file = models.expert(task) / "config.json"
    names = [f"kind {index}" for index in range(count)]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"id2label": dict(enumerate(names))}))
    model = quantized(models.recipe, tmp_path)
    out = export(model, "wasm", tmp_path / "out", "--demo-libraries", stand_ins, *MATMULNBITS)
    settings = json.loads((out / "demo" / "settings.json").read_text())
    shown = {entry["name"]: entry["classes"] for entry in settings["tasks"]}
    assert shown[task] == names
    assert shown == json.loads((out / "manifest.json").read_text())["details"]["classes"]


def test_texts_bring_their_tokenizer(texts_model: Path, stand_ins: Path, tmp_path: Path) -> None:
    flags = ["--demo-libraries", stand_ins, *MATMULNBITS]
    out = export(texts_model, "wasm", tmp_path / "out", *flags)
    text = json.loads((out / "demo" / "settings.json").read_text())["text"]
    assert text["max_length"] == 16
    for part in ("library", "tokenizer", "config"):
        assert (out / "demo" / text[part]).is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "cpu"], "export.demo needs export.target wasm or webgpu"),
        ([], "export.demo needs export.target"),
        (["--target", "webgpu"], "npm install --ignore-scripts --prefix"),
    ],
)
def test_what_is_missing_is_said_before_any_work(
    images_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    missing = ["--demo-libraries", tmp_path / "none", "--formats", "qdq", "--demo"]
    assert run("export", images_model, "-o", tmp_path / "out", *flags, *missing) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_libraries_of_another_version_are_refused(
    images_model: Path, stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = stand_ins / "node_modules" / "onnxruntime-web" / "package.json"
    package.write_text('{"version": "1.0.0"}')
    flags = ["--target", "wasm", "--formats", "qdq", "--demo", "--demo-libraries", stand_ins]
    assert run("export", images_model, "-o", tmp_path / "out", *flags) == 2
    assert "onnxruntime-web missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 5}, "resample 5"),
        ({"size": {"shortest_edge": 8}}, "crop_size .* larger than"),
        ({"do_resize": False}, "crop_size .* larger than"),
    ],
)
def test_preprocessing_the_page_lacks_is_refused(
    tiny: TinyZoo, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    settings = json.loads((tiny.base / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | change))
    (tmp_path / "config.json").write_text((tiny.base / "config.json").read_text())
    options, family = ExportOptions(target="wasm", demo=True), family_of(tiny.base)
    with pytest.raises(RecipeError, match=message):
        check_demo_model(options, family, tmp_path, {"red": SINGLE_LABEL})
    with pytest.raises(RecipeError, match="no task has a head"):
        check_demo_model(options, family, tiny.base, {})
    check_demo_model(options, family, tiny.base, {"red": SINGLE_LABEL})
    with pytest.raises(RecipeError, match="red has a head for regression"):
        check_demo_model(options, family, tiny.base, {"red": REGRESSION})
