"""Recipes as people write them: what YAML makes of their words, and what is given twice."""

import re
from pathlib import Path

import pytest
import yaml

from epmq_deploy.errors import RecipeError
from epmq_deploy.options import read_yaml
from epmq_deploy.recipe import Recipe, load_recipe, parse_recipe

MINIMAL_BLOCK = "base: {path: b}\ntasks:\n  t:\n    expert: e\n"
MINIMAL = "base: {path: b}\ntasks:\n  t: {expert: e}\n"


def load(folder: Path, text: str) -> Recipe:
    (folder / "r.yaml").write_text(text)
    return load_recipe(folder / "r.yaml")


def refused(folder: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(folder, text)
    return str(caught.value).removeprefix(f"{folder}/r.yaml: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MINIMAL + "  u: {expert: f}\n  t:\n    expert: g\n",
            "line 5: t is given twice, first in line 3; keep one of them",
        ),
        (
            MINIMAL + "merge: {scaling: 0.1}\nquantize: {bits: 3}\nmerge: {method: ties}\n",
            "line 6: merge is given twice, first in line 4; keep one of them",
        ),
        (
            "base: {path: b}\ntasks:\n  t:\n    expert: e\n    evaluation:\n      path: x\n"
            "      split: a\n      'path': y\n",
            "line 8: path is given twice, first in line 6; keep one of them",
        ),
        (
            MINIMAL + "quantize:\n  layers:\n    '*': {bits: 3, bits: 4}\n",
            "line 6: bits is given twice, first in line 6; keep one of them",
        ),
        (
            "x-a: &a {expert: e}\nx-b: &b {head: {from_expert: true}}\nbase: {path: b}\n"
            "tasks:\n  t:\n    <<: *a\n    <<: *b\n",
            "line 7: << is given twice, first in line 6; write <<: [*first, *second]",
        ),
        (
            MINIMAL + "export:\n  formats: [qdq, fp16, qdq]\n",
            "line 5: export.formats: qdq is given twice; keep one of them",
        ),
        (MINIMAL + "1: {}\n'1': {}\n", "line 5: 1 is given twice, first in line 4"),
    ],
)
def test_nothing_is_given_twice(tmp_path: Path, text: str, message: str) -> None:
    assert refused(tmp_path, text).startswith(message)


@pytest.mark.parametrize(
    "names",
    [
        ["yes", "no"],
        ["on", "off", "y", "n"],
        ["1", "10", "2"],
        ["007", "0x1F", "1_000", "1:30", "3e-1", "1.10", ".inf"],
        ["true", "false", "TRUE"],
        ["2024-01-01", "12:30:45"],
        ["=", "None", "nan"],
    ],
)
def test_class_names_are_taken_as_they_are_written(tmp_path: Path, names: list[str]) -> None:
    head = f"head: {{classes: [{', '.join(names)}]}}"
    flow = load(tmp_path, f"base: {{path: b}}\ntasks: {{t: {{expert: e, {head}}}}}\n")
    lines = "".join(f"\n        - {name}" for name in names)
    block = load(
        tmp_path,
        f"base: {{path: b}}\ntasks:\n  t:\n    expert: e\n    head:\n      classes:{lines}",
    )
    for recipe in (flow, block):
        assert list(recipe.tasks["t"].head.classes) == names  # type: ignore[union-attr,arg-type]


def test_answers_splits_columns_and_names_of_tasks_are_text(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "base: {path: b}\ntasks:\n"
        "  no:\n    expert: e\n    prompt: {answers: [yes, no]}\n"
        "    evaluation: {path: d, split: 2024, label_column: 1, subset: false}\n"
        "  2024: {expert: f}\n",
    )
    task = recipe.tasks["no"]
    assert task.prompt is not None
    assert task.prompt.answers == ("yes", "no")
    assert task.evaluation is not None
    assert (task.evaluation.split, task.evaluation.label_column) == ("2024", "1")
    assert task.evaluation.subset == "false"
    assert list(recipe.tasks) == ["no", "2024"]


@pytest.mark.parametrize("written", ["~", "null", "Null", ""])
def test_nothing_is_no_class_name(tmp_path: Path, written: str) -> None:
    text = f"{MINIMAL_BLOCK}    head:\n      classes:\n      - {written}\n"
    assert refused(tmp_path, text) == (
        "line 7: tasks.t.head.classes.0: nothing is given; put ~ and null in quotes where they "
        "are text"
    )
    quoted = text.replace(f"- {written}", f"- '{written}'")
    assert load(tmp_path, quoted).tasks["t"].head.classes == (written,)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("written", "value"),
    [("3e-1", 0.3), ("3E-1", 0.3), ("1e0", 1.0), (".5", 0.5), ("+0.5", 0.5), ("1.", 1.0)],
)
def test_numbers_in_all_spellings(tmp_path: Path, written: str, value: float) -> None:
    assert read_yaml(written).content == value
    recipe = load(tmp_path, f"{MINIMAL}merge: {{scaling: {written}}}\n")
    assert recipe.merge.model_dump()["scaling"] == value


def test_numbers_mean_what_they_look_like(tmp_path: Path) -> None:
    """YAML 1.1 reads 010 as 8 and 1:30 as 90."""
    assert load(tmp_path, f"{MINIMAL}quantize: {{samples: 010}}\n").quantize.samples == 10  # type: ignore[union-attr]
    assert "line 4: quantize.samples: " in refused(
        tmp_path, f"{MINIMAL}quantize: {{samples: 1:30}}"
    )


@pytest.mark.parametrize("written", ["yes", "true", "on", "True"])
def test_a_boolean_is_no_number(tmp_path: Path, written: str) -> None:
    for section, option in (("merge", "scaling"), ("quantize", "samples"), ("quantize", "bits")):
        text = refused(tmp_path, f"{MINIMAL}{section}: {{{option}: {written}}}\n")
        assert text.startswith(f"line 4: {section}.{option}: ")
    assert load(tmp_path, f"{MINIMAL}export: {{demo: {written}}}\n").export.demo is True
    with pytest.raises(RecipeError, match=r"merge\.scaling: must be a number, found True"):
        parse_recipe(yaml.safe_load(MINIMAL) | {"merge": {"scaling": True}}, "r")


def test_every_problem_has_its_line(tmp_path: Path) -> None:
    text = refused(
        tmp_path,
        MINIMAL + "    # the expert of\n  u:\n    head: {}\nmerge:\n  density: 3\n\nquantise: {}\n",
    )
    lines = dict(re.findall(r"line (\d+): ([\w.]+): ", text))
    assert lines == {
        "5": "tasks.u.expert",
        "6": "tasks.u.head",
        "8": "merge.density",
        "10": "quantise",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base:\n\tpath: b\n", "line 2: not YAML (a tab); indent with spaces"),
        ("base: {path: b\n", "line 2: not YAML ("),
        ("base: {path: b}\nname: a: b\n", "line 2: not YAML (mapping values are not allowed here)"),
        ("base: {path: b}\ntasks: {? [a, b] : c}\n", "line 2: a key must be text"),
        ("base: &a\n  path: *b\n", "line 2: not YAML (found undefined alias"),
        ("base: &a\n  path: [*a]\n", "line 1: contains itself by an alias"),
        ("base: {path: b}\n---\nbase: {path: c}\n", "line 2: not YAML ("),
        ("base: !!python/name:os.system\n", "line 1: not YAML (could not determine a constructor"),
        ("base: !!int x\n", "line 1: not YAML ('x' is not a number)"),
        ("a: 1\nbase: \x01\n", "line 2: not YAML (special characters are not allowed)"),
        ("[" * 5000, "not YAML that can be read (nested too deeply)"),
        ("<<: 3\n", "line 1: not YAML ("),
        (f"base: {'9' * 5000}\n", "line 1: not YAML ("),
    ],
)
def test_what_is_no_yaml_is_said_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    assert refused(tmp_path, text).startswith(message)


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "x-data: &data {path: data.csv, split: test, input_column: sentence}\n"
        "x-head: &head\n  templates: ['a photo of a {}.']\n"
        "base: {path: b}\n"
        "tasks:\n"
        "  t: {expert: e, evaluation: *data, head: {<<: *head, classes: [no, yes]}}\n"
        "  u:\n    expert: f\n    evaluation:\n      <<: [*data]\n      split: 2\n",
    )
    first, second = recipe.tasks["t"], recipe.tasks["u"]
    assert first.evaluation is not None
    assert second.evaluation is not None
    assert (first.evaluation.split, second.evaluation.split) == ("test", "2")
    assert second.evaluation.input_column == "sentence"
    assert first.head is not None
    assert first.head.classes == ("no", "yes")


def test_environment_variables_and_home_in_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "a$MODELS").mkdir()
    text = (
        "base: {path: $MODELS/base}\n"
        "tasks:\n  t:\n    expert: '${MODELS}/e'\n    evaluation: {path: ~/data.csv}\n"
        "    head: {matrix: $MODELS/head.safetensors}\n  u: {expert: a$MODELS}\n"
    )
    recipe = load(tmp_path, text)
    task = recipe.tasks["t"]
    assert recipe.base.path == str(tmp_path / "models" / "base")
    assert task.expert == str(tmp_path / "models" / "e")
    assert task.evaluation is not None
    assert task.evaluation.path == str(tmp_path / "home" / "data.csv")
    assert task.head is not None
    assert task.head.matrix == str(tmp_path / "models" / "head.safetensors")
    assert recipe.tasks["u"].expert == str(tmp_path / "a$MODELS")
    message = refused(tmp_path, text.replace("$MODELS/base", "$NOWHERE/base"))
    assert message == (
        "line 1: base.path: '$NOWHERE/base': environment variable NOWHERE is not set"
    )
    message = refused(tmp_path, text.replace("'${MODELS}/e'", "'${NOWHERE}/e'"))
    assert message.startswith("line 4: tasks.t.expert: ")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("''", "not a path"),
        ('"a\\0b"', "not a path"),
        ("~no-such-user/x", "determine home directory"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_paths_that_no_file_can_have(tmp_path: Path, path: str, reason: str) -> None:
    message = refused(tmp_path, f"base: {{path: b}}\ntasks:\n  t:\n    expert: {path}\n")
    assert message.startswith("line 4: tasks.t.expert: ")
    assert reason in message


def test_the_recipe_s_own_folder_as_a_path(tmp_path: Path) -> None:
    assert load(tmp_path, "base: {path: .}\ntasks: {t: {expert: ./e}}\n").base.path == str(tmp_path)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a directory, not a recipe; it holds no YAML file"):
        load_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    (tmp_path / "other.yml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"give a file in it \(other\.yml, recipe\.yaml\)"):
        load_recipe(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load_recipe(tmp_path / "r.yaml").tasks["t"].expert.endswith("/e")
    (tmp_path / "r.yaml").write_text(MINIMAL, encoding="utf-16")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: [1, 0x1F, 0o17, -3, +4, 1.5, 1e3, .inf, true, False, null, ~]",
        "a: &x {b: 1}\nc: {<<: *x, d: 'no'}\ne: |\n  text\n  more\nf: >-\n  folded\n",
        'a: "quoted \\n"\nb: !!str 12\nc: []\nd: {}\n',
    ],
)
def test_where_yaml_is_clear_the_library_agrees(text: str) -> None:
    loaded = yaml.safe_load(text.replace("0o17", "15").replace("1e3", "1.0e+3"))
    assert read_yaml(text).content == loaded
