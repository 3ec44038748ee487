"""Recipes with odd contents, as data and as text."""

from pathlib import Path

import pytest
import yaml
from fuzzing import cases, succeeds_or_explains
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged, mutated

from epmq_deploy.options import YamlError, read_yaml
from epmq_deploy.recipe import load_recipe, override

RECIPE = {
    "x-data": {"split": "test"},
    "base": {"path": "base", "part": "image"},
    "tasks": {
        "one": {
            "expert": "owner/expert@main",
            "calibration": {"path": "data/one.csv", "input_column": "text", "label_column": None},
            "evaluation": {"path": "~/data", "split": "test", "subset": "a"},
            "head": {"classes": ["yes", "no"], "templates": ["a {}."]},
        },
        "two": {
            "expert": "open_clip:ViT-B-32=weights.safetensors",
            "head": {"matrix": "$HOME/head.safetensors"},
            "prompt": {"template": "{text}", "answers": ["1", "2"], "max_tokens": 3},
        },
    },
    "merge": {"method": "ties", "scaling": 0.3, "layers": {"*.fc1": {"scaling": 1}}},
    "quantize": {"bits": 4, "group_size": 16, "anchor": "auto", "layers": {"*": {"bits": 8}}},
    "export": {"formats": ["qdq"], "opset": 21, "demo": False},
    "eval": {"threads": [1, 2], "max_drop": 0.5, "provider": "cpu"},
}
TEXT = yaml.safe_dump(RECIPE).replace("'1'", "1") + "x: &a {b: ~}\nx-y: {<<: *a}\n# comment\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@cases(2500)
@given(content=mutated(RECIPE))
def test_recipes_with_odd_values(folder: Path, content: object) -> None:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    succeeds_or_explains(lambda: load_recipe(file))


@cases(1500)
@given(content=damaged(TEXT.encode()))
def test_recipes_with_damaged_text(folder: Path, content: bytes) -> None:
    file = folder / "recipe.yaml"
    file.write_bytes(content)
    succeeds_or_explains(lambda: load_recipe(file))


@cases(500)
@given(text=st.text(alphabet="ab:-[]{}&*!|>'\"%@`,?#\t\n\r \\<=~0123.e+_nyoft\0é\ufeff\u2028"))
def test_texts_of_yaml_s_own_characters(text: str) -> None:
    try:
        read_yaml(text)
    except YamlError as error:
        assert str(error).strip()


@cases(300)
@given(options=mutated({"bits": 3, "group_size": 16, "skip": ["a"], "method": "gptq"}))
def test_overrides_with_odd_values(folder: Path, options: object) -> None:
    file = folder / "plain.yaml"
    file.write_text("base: {path: b}\ntasks: {t: {expert: e}}\n")
    if isinstance(options, dict) and all(isinstance(key, str) for key in options):
        succeeds_or_explains(lambda: override(load_recipe(file), "quantize", options))
