"""Settings of base models, experts and adapters with odd values: what a run checks first."""

import json
from pathlib import Path

import pytest
from fuzzing import cases, changed_copy, succeeds_or_explains
from hypothesis import given
from hypothesis import strategies as st
from mutations import broken_json
from tiny_folder import TinyFolder
from tiny_text import TinyText
from tiny_text_generators import TEXT_GENERATORS, build_tiny_text_generators
from tiny_zoo import TinyZoo
from transformers import AutoTokenizer

from epmq_deploy.pipeline import preflight
from epmq_deploy.recipe import load_recipe


@pytest.fixture(scope="module")
def models(
    tiny: TinyZoo, tiny_text: TinyText, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, TinyFolder]:
    """Tiny models by kind."""
    generators = {
        name: build_tiny_text_generators(tmp_path_factory.mktemp(name), TEXT_GENERATORS[name])
        for name in ("t5", "llama")
    }
    AutoTokenizer.from_pretrained(tiny_text.base).save_pretrained(tiny_text.base)
    return {"zoo": tiny, "text": tiny_text, **generators}


FILES = {
    "zoo": ["base/config.json", "base/preprocessor_config.json", "experts/red/config.json"],
    "text": [
        "base/config.json",
        "base/tokenizer.json",
        "base/tokenizer_config.json",
        "experts/tone/config.json",
    ],
    "t5": ["base/config.json", "base/tokenizer_config.json"],
    "llama": ["base/config.json", "base/tokenizer_config.json", "experts/first/config.json"],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in FILES for name in FILES[kind]])
@cases(40)
@given(data=st.data())
def test_settings_with_odd_values(
    models: dict[str, TinyFolder], kind: str, name: str, data: st.DataObject
) -> None:
    folder, file = models[kind].folder, Path(name)
    content = data.draw(broken_json(json.loads((folder / file).read_text())))
    with changed_copy(folder, file, content) as copy:
        succeeds_or_explains(lambda: preflight(load_recipe(copy / "recipe.yaml")))
