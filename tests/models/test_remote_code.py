"""Code that comes with a model is never run, wherever its settings point to it."""

import json
import pickle
from pathlib import Path

import pytest
from tiny_folder import TinyFolder
from tiny_text import build_tiny_text
from tiny_text_generators import TEXT_GENERATORS, build_tiny_text_generators
from tiny_zoo import build_tiny_zoo

from epmq_deploy.errors import EpmqError
from epmq_deploy.merging.stage import merge
from epmq_deploy.pipeline import preflight
from epmq_deploy.recipe import load_recipe

CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForSeq2SeqLM",
    "AutoImageProcessor",
    "AutoProcessor",
    "AutoFeatureExtractor",
)


class Evil:
    """Unpickled, it would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


def build(kind: str, folder: Path) -> TinyFolder:
    if kind == "zoo":
        return build_tiny_zoo(folder)
    if kind == "text":
        return build_tiny_text(folder)
    return build_tiny_text_generators(folder, TEXT_GENERATORS[kind])


def point_to_code(folder: Path, mark: Path) -> None:
    """Add code to a model folder that leaves a mark when it is imported or unpickled."""
    names = "".join(f"class {name}X: pass\n" for name in (*CLASSES, "AutoTokenizer"))
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n{names}"
    )
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        content["auto_map"] = {each: f"evil.{each}X" for each in CLASSES}
        content["auto_map"]["AutoTokenizer"] = ["evil.AutoTokenizerX", "evil.AutoTokenizerX"]
        if file.is_file():
            file.write_text(json.dumps(content))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"):
        (folder / name).write_bytes(pickle.dumps(Evil(mark)))


@pytest.mark.parametrize("model_type", [None, "unheard-of"])
@pytest.mark.parametrize("kind", ["zoo", "text", "t5", "llama"])
def test_code_in_model_folders_is_not_run(
    tmp_path: Path, kind: str, model_type: str | None
) -> None:
    models = build(kind, tmp_path)
    mark = tmp_path / "mark"
    for file in tmp_path.rglob("config.json"):
        point_to_code(file.parent, mark)
        if model_type is not None:
            config = json.loads(file.read_text())
            file.write_text(json.dumps(config | {"model_type": model_type}))
    recipe = load_recipe(models.recipe)
    if model_type is None:
        preflight(recipe)
        merge(recipe, tmp_path / "merged")
    else:
        with pytest.raises(EpmqError):
            preflight(recipe)
    assert not mark.exists()
    pickle.loads((models.base / "training_args.bin").read_bytes())
    assert mark.exists()  # the trap works
