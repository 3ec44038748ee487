"""A static page that runs an exported graph in the browser, for images or texts.

The page itself is in ``demo/``; it needs onnxruntime-web (and for texts a tokenizer) from npm, in
the versions ``demo/package.json`` pins. They are copied from a folder that ``npm install`` made and
are never fetched here.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from epmq_deploy.errors import RecipeError
from epmq_deploy.exporters.targets import TARGETS
from epmq_deploy.exporters.targets.base import WebRuntime
from epmq_deploy.models import ModelFamily
from epmq_deploy.models.encoders.text_classifier import TextClassifierFamily
from epmq_deploy.models.image_inputs import image_processor
from epmq_deploy.models.problem_types import SINGLE_LABEL
from epmq_deploy.models.text_generation.base import generates_text
from epmq_deploy.recipe import ExportOptions, ProblemType, Recipe
from epmq_deploy.runtime.ort.graph_runs import session_config

DEMO_FOLDER = "demo"
_PAGE = ("index.html", "app.js", "classifier.js", "files.js", "images.js", "texts.js")
_RUNTIME, _TOKENIZERS = "onnxruntime-web", "@huggingface/tokenizers"
_WITHOUT_DEMO = {"export.demo": False}
_RESAMPLING = {1: "lanczos", 2: "bilinear", 3: "bicubic"}


def default_libraries() -> Path:
    """Where the page's libraries are looked for unless ``export.demo_libraries`` says otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "epmq-deploy" / "web"


def check_demo(recipe: Recipe, family: ModelFamily) -> None:
    """Make sure that a page can be written, before any work.

    Raises:
        RecipeError: the model generates text or reads pairs of texts, a task's inputs are
            made as its expert makes them, the target is no browser, or
            libraries are missing or of another version; names the command that installs them.
    """
    options = recipe.export
    if not options.demo:
        return
    if generates_text(family):
        raise RecipeError(
            "export.demo: the page only classifies, but this model generates text; leave it out",
            options=_WITHOUT_DEMO,
        )
    changed = [name for name, task in recipe.tasks.items() if task.inputs_from != "base"]
    if changed:
        raise RecipeError(
            f"export.demo: the page makes all inputs as the base does, and {changed[0]} has "
            "inputs_from: expert; leave one of them out",
            options=_WITHOUT_DEMO,
        )
    if pairs := [name for name, task in recipe.tasks.items() if task.text_pair is not None]:
        raise RecipeError(
            f"export.demo: the page has one field for a text, and {pairs[0]} reads pairs; leave it "
            "out",
            options=_WITHOUT_DEMO,
        )
    if _web_runtime(options) is None:
        browsers = [target.name for target in TARGETS.values() if target.web is not None]
        raise RecipeError(
            f"export.demo needs export.target {' or '.join(browsers)}",
            options={"export.target": None},
        )
    folder = _libraries(options)
    pinned = _pinned()
    wrong = [name for name, version in pinned.items() if _installed(folder, name) != version]
    if wrong:
        packages = " ".join(f"{name}@{version}" for name, version in pinned.items())
        raise RecipeError(
            f"export.demo: {' and '.join(wrong)} missing in {folder}, or in another version than "
            f"needed; run\n  npm install --ignore-scripts --prefix {folder} {packages}",
            options={"export.demo_libraries": None},
        )


def check_demo_model(
    options: ExportOptions,
    family: ModelFamily,
    folder: Path,
    problem_types: Mapping[str, ProblemType],
) -> None:
    """Make sure that the page can preprocess for a model and has something to show.

    Args:
        options: of the export.
        family: the model's family.
        folder: a model folder with preprocessor or tokenizer.
        problem_types: of the tasks that have a head.

    Raises:
        RecipeError: it cannot, or there is no task with a head, or one that it cannot show.
    """
    if not options.demo:
        return
    others = [name for name, kind in problem_types.items() if kind != SINGLE_LABEL]
    if others:
        raise RecipeError(
            f"export.demo: the page shows one of several classes, and {others[0]} has a head for "
            f"{problem_types[others[0]]}; leave it out",
            options=_WITHOUT_DEMO,
        )
    if not problem_types:
        raise RecipeError(
            "export.demo: no task has a head, so there is nothing to show", options=_WITHOUT_DEMO
        )
    if isinstance(family, TextClassifierFamily):
        _fast_tokenizer(folder, family)
    else:
        image_settings(folder)


def write_demo(
    folder: Path,
    family: ModelFamily,
    classes: Mapping[str, Sequence[str] | None],
    graph: Path,
    options: ExportOptions,
    numbered: Sequence[str] = (),
) -> None:
    """Write the page into ``<folder>/demo``.

    Args:
        folder: the exported folder, complete but for the manifest.
        family: the model's family.
        classes: names of each task's classes, where they are known; tasks the graph has logits of.
        graph: the graph to run, in ``folder``.
        options: with target and libraries.
        numbered: tasks in the order that the graph's input ``task`` numbers them; none where it has
            no such input.

    Raises:
        RecipeError: the model's preprocessing has no counterpart in the page.
    """
    web = _web_runtime(options)
    assert web is not None, "check_demo has made sure"
    target = folder / DEMO_FOLDER
    (target / "vendor").mkdir(parents=True)
    for name in _PAGE:
        (target / name).write_bytes(_source(name))
    libraries = (web.module, f"{web.binary}.mjs", f"{web.binary}.wasm")
    needed = [f"{_RUNTIME}/dist/{name}" for name in libraries]
    settings: dict[str, Any] = {
        "modality": family.modality,
        "provider": options.target,
        "library": f"vendor/{web.module}",
        "graph": f"../{graph.relative_to(folder).as_posix()}",
        "external_data": [file.name for file in graph.parent.glob(f"{graph.name}_data")],
        "session_config": _nested(session_config(options.accuracy_level)),
        "inputs": list(family.input_names),
        "tasks": [
            {"name": name, "output": f"logits_{name}", "classes": names and list(names)}
            | ({"number": numbered.index(name)} if name in numbered else {})
            for name, names in classes.items()
        ],
    }
    if isinstance(family, TextClassifierFamily):
        needed.append(f"{_TOKENIZERS}/dist/tokenizers.min.mjs")
        settings["text"] = _text_settings(folder, family, target)
    else:
        settings["image"] = image_settings(folder)
    for file in needed:
        source = _libraries(options) / "node_modules" / file
        shutil.copyfile(source, target / "vendor" / source.name)
    (target / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")


def image_settings(folder: Path) -> dict[str, Any]:
    """How ``demo/images.js`` is to do what the folder's image processor does.

    Raises:
        RecipeError: the processor does something else too, or in another way.
    """
    processor = image_processor(folder).to_dict()
    crop = processor.get("crop_size") if processor.get("do_center_crop") else None
    size = processor.get("size") if processor.get("do_resize") else None
    problems = []
    if size is not None and set(size) not in ({"shortest_edge"}, {"height", "width"}):
        problems.append(f"size {size}")
    if size is not None and processor.get("resample") not in _RESAMPLING:
        problems.append(f"resample {processor.get('resample')}")
    if processor.get("do_pad"):
        problems.append("do_pad")
    if crop is not None and (size is None or max(crop.values()) > min(size.values())):
        problems.append(f"crop_size {crop} larger than size {size}, which would need padding")
    if problems:
        raise RecipeError(
            f"export.demo: the page cannot preprocess images with {', '.join(problems)}",
            options=_WITHOUT_DEMO,
        )
    normalize = processor.get("do_normalize")
    return {
        "resize": size,
        "resample": _RESAMPLING.get(processor.get("resample")),
        "crop": crop,
        "scale": processor["rescale_factor"] if processor.get("do_rescale") else 1.0,
        "mean": list(processor["image_mean"]) if normalize else [0.0] * 3,
        "std": list(processor["image_std"]) if normalize else [1.0] * 3,
    }


def _text_settings(folder: Path, family: TextClassifierFamily, target: Path) -> dict[str, Any]:
    """Write the tokenizer in one file next to the page, and return what kind it is."""
    tokenizer = _fast_tokenizer(folder, family)
    tokenizer.save_pretrained(target / "tokenizer")
    return {
        "library": "vendor/tokenizers.min.mjs",
        "tokenizer": "tokenizer/tokenizer.json",
        "config": "tokenizer/tokenizer_config.json",
        "max_length": tokenizer.model_max_length,
    }


def _fast_tokenizer(folder: Path, family: TextClassifierFamily) -> Any:
    tokenizer = family.tokenizer(folder)
    if not tokenizer.is_fast:
        raise RecipeError(
            f"export.demo: {type(tokenizer).__name__} is not a fast tokenizer, and the page can "
            "run no other kind",
            options=_WITHOUT_DEMO,
        )
    return tokenizer


def _nested(entries: Mapping[str, str]) -> dict[str, Any]:
    """``session.key`` entries as onnxruntime-web takes them: objects within objects."""
    nested: dict[str, Any] = {}
    for entry, value in entries.items():
        *path, last = entry.split(".")
        level = nested
        for part in path:
            level = level.setdefault(part, {})
        level[last] = value
    return nested


def _web_runtime(options: ExportOptions) -> WebRuntime | None:
    """Return what the page runs the target's graphs with; None if the target is no browser."""
    return None if options.target is None else TARGETS.named(options.target).web


def _libraries(options: ExportOptions) -> Path:
    return Path(options.demo_libraries) if options.demo_libraries else default_libraries()


def _pinned() -> dict[str, str]:
    versions: dict[str, str] = json.loads(_source("package.json"))["dependencies"]
    return versions


def _source(name: str) -> bytes:
    return (files("epmq_deploy.exporters.browser") / "web" / name).read_bytes()


def _installed(folder: Path, package: str) -> str | None:
    file = folder / "node_modules" / package / "package.json"
    return str(json.loads(file.read_text(encoding="utf-8"))["version"]) if file.is_file() else None
