"""The recipe: what is wrong is named, flags override."""

from pathlib import Path

import pytest

from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.recipe import load_recipe, override, parse_recipe

MINIMAL = {"base": {"path": "b"}, "tasks": {"t": {"expert": "e"}}}


def test_every_wrong_key_is_named_with_what_is_allowed() -> None:
    content = {
        "base": {"path": "b", "colour": "red"},
        "tasks": {"a b": {"expert": "e"}, "t": {"expert": "e", "head": {}}},
        "merge": {"method": "ties", "density": 3},
        "quantize": {"bits": 5, "group_size": 24},
        "deploy": {},
    }
    with pytest.raises(RecipeError) as caught:
        parse_recipe(content, "recipe.yaml")
    text = str(caught.value)
    assert text.startswith("recipe.yaml: 7 problem(s)")
    assert "base.colour: no such option; allowed here: path, part, found 'red'" in text
    assert "tasks.t.head: " in text
    assert "merge.density: " in text
    assert "quantize.bits: Input should be 2, 3, 4 or 8, found 5" in text
    assert "quantize.group_size: " in text
    assert "multiple of 16" in text
    assert "deploy: no such option; allowed here: base, tasks, merge" in text


def test_one_problem_is_one_sentence() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(MINIMAL | {"quantize": {"bits": 5}}, "r.yaml")
    assert str(caught.value) == "r.yaml: quantize.bits: Input should be 2, 3, 4 or 8, found 5"
    assert str(MismatchError("data", ["no file"])) == "data: no file"
    assert str(MismatchError("data", ["a", "b"])) == "data: 2 problem(s)\n  - a\n  - b"


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(
        RecipeError,
        match=r"merge\.method: unknown method 'magic'; choose from .*average, .*, ties, ",
    ):
        parse_recipe(MINIMAL | {"merge": {"method": "magic"}}, "recipe.yaml")


def test_section_without_method_takes_the_default() -> None:
    recipe = parse_recipe(MINIMAL | {"quantize": {"bits": 3}, "merge": {"scaling": 0.5}}, "r")
    assert (recipe.quantize.method, recipe.quantize.bits) == ("epmq", 3)
    assert recipe.merge.model_dump()["scaling"] == 0.5


def test_paths_are_taken_from_the_recipe_s_folder(tmp_path: Path) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "r.yaml").write_text(
        "base: {path: models/base}\n"
        "tasks: {t: {expert: owner/model-on-the-hub, calibration: {path: ./data.csv}}}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.base.path == str(tmp_path / "models" / "base")
    assert recipe.tasks["t"].expert == "owner/model-on-the-hub"
    source = recipe.tasks["t"].calibration
    assert source is not None
    assert source.path == str(tmp_path / "data.csv")


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not YAML"), ("just text", "recipe"), ("", "recipe")]
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "missing.yaml")


def test_flags_override_and_a_new_method_keeps_what_it_shares() -> None:
    recipe = parse_recipe(MINIMAL | {"quantize": {"anchor": 0.7, "bits": 3}}, "r")
    same = override(recipe, "quantize", {"bits": 8, "anchor": None})
    assert same.quantize.model_dump()["anchor"] == 0.7
    assert same.quantize.bits == 8
    other = override(recipe, "quantize", {"method": "rtn"})
    assert (other.quantize.method, other.quantize.bits) == ("rtn", 3)
    scaled = parse_recipe(MINIMAL | {"merge": {"method": "ties", "scaling": 1.5}}, "r")
    plain = override(scaled, "merge", {"method": "task_arithmetic"})
    assert plain.merge.model_dump()["scaling"] == 0.3  # not TIES's
    with pytest.raises(RecipeError, match=r"quantize\.anchor"):
        override(recipe, "quantize", {"method": "rtn", "anchor": 1.0})


def test_recipes_are_frozen() -> None:
    recipe = parse_recipe(MINIMAL, "r")
    with pytest.raises(Exception, match="frozen"):
        recipe.quantize.bits = 3


def test_empty_sections_mean_defaults_and_nan_is_refused() -> None:
    assert parse_recipe(MINIMAL | {"merge": None, "eval": None}, "r").merge.method
    with pytest.raises(RecipeError, match=r"merge\.scaling: .*finite"):
        parse_recipe(MINIMAL | {"merge": {"scaling": float("nan")}}, "r")
