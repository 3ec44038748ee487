"""Stage folders: atomic, verified, never lost."""

from pathlib import Path

import pytest

from epmq_deploy.artifacts.folders import atomic_folder, refuse_existing
from epmq_deploy.artifacts.manifest import MergeManifest, fingerprint, read_manifest
from epmq_deploy.artifacts.outputs import check_outputs, finish_output, is_done
from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import parse_recipe

RECIPE = parse_recipe({"base": {"path": "b"}, "tasks": {"t": {"expert": "e"}}}, "test")


def write(folder: Path, text: str, overwrite: bool = False) -> None:
    refuse_existing(folder, "merge", overwrite=overwrite)
    with atomic_folder(folder) as temporary:
        (temporary / "data.txt").write_text(text)
        finish_output(
            temporary, MergeManifest(fingerprint="mark", recipe=RECIPE, inputs={"base": "x"})
        )


def test_manifest_round_trip(tmp_path: Path) -> None:
    write(tmp_path / "out", "hello")
    manifest = read_manifest(tmp_path / "out", "merge")
    assert manifest.recipe == RECIPE
    assert manifest.inputs == {"base": "x"}
    assert set(manifest.outputs) == {"data.txt"}
    assert "torch" in manifest.versions
    check_outputs(tmp_path / "out", manifest)
    assert is_done(tmp_path / "out", "merge", "mark")
    assert not is_done(tmp_path / "out", "merge", "other mark")


def test_failure_leaves_nothing_and_keeps_the_old_output(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    for target in (tmp_path / "out", tmp_path / "new"):
        with (
            pytest.raises(ZeroDivisionError),
            atomic_folder(target) as temporary,
        ):
            (temporary / "data.txt").write_text("half")
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "data.txt").read_text() == "old"


def test_existing_output_is_refused_then_replaced(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(RecipeError, match="already exists; choose another output or overwrite it"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "data.txt").read_text() == "old"
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "data.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_someone_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match="not replaced"):
        write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("damage", ["change", "delete"])
def test_damaged_outputs_are_noticed(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "out", "hello")
    manifest = read_manifest(tmp_path / "out", "merge")
    file = tmp_path / "out" / "data.txt"
    file.write_text("hullo") if damage == "change" else file.unlink()
    with pytest.raises(RecipeError, match=r"data\.txt"):
        check_outputs(tmp_path / "out", manifest)
    assert not is_done(tmp_path / "out", "merge", "mark")


def test_wrong_stage_and_no_stage_are_explained(tmp_path: Path) -> None:
    write(tmp_path / "out", "hello")
    with pytest.raises(
        RecipeError, match="output of `epmq merge`, but that of `epmq export` is needed"
    ):
        read_manifest(tmp_path / "out", "export")
    with pytest.raises(RecipeError, match=r"no manifest\.json"):
        read_manifest(tmp_path, "merge")


def test_fingerprint_depends_on_options_and_inputs_only() -> None:
    reference = fingerprint("merge", {"a": 1, "b": 2}, {"x": "1", "y": "2"})
    assert fingerprint("merge", {"b": 2, "a": 1}, {"y": "2", "x": "1"}) == reference
    assert fingerprint("merge", {"a": 1, "b": 3}, {"x": "1", "y": "2"}) != reference
    assert fingerprint("merge", {"a": 1, "b": 2}, {"x": "1", "y": "3"}) != reference
    assert fingerprint("export", {"a": 1, "b": 2}, {"x": "1", "y": "2"}) != reference


def test_only_this_stage_s_output_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "out", "codes")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "an app"}')
    (tmp_path / "file").write_text("text")
    for name, stage, message in (
        ("out", "export", "not the output of `epmq export`"),
        ("web", "merge", "not the output of `epmq merge`"),
        ("file", "merge", "is not a directory"),
        ("file/below", "merge", "is not a directory"),
    ):
        with pytest.raises(RecipeError, match=message):
            refuse_existing(tmp_path / name, stage, overwrite=True)
    refuse_existing(tmp_path / "out", "merge", overwrite=True)


@pytest.mark.parametrize("inside", [".", "deeper/q", ".."])
def test_output_and_input_must_not_contain_each_other(tmp_path: Path, inside: str) -> None:
    (tmp_path / "a" / "merged").mkdir(parents=True)
    source = tmp_path / "a" / "merged"
    with pytest.raises(RecipeError, match="must not contain each other"):
        refuse_existing(source / inside, "quantize", overwrite=True, source=source)
    refuse_existing(source.parent / "other", "quantize", overwrite=False, source=source)
