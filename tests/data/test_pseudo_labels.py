"""Calibration data without labels: experts' own answers take their place."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import killed_in
from merged_text_generators import MergedTextGenerator

from epmq_deploy.artifacts.manifest import read_manifest
from epmq_deploy.data.pseudo_labels import with_answers, write_answers
from epmq_deploy.data.samples import TextSamples, load_samples
from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.merging.stage import merge
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.models.text_generation.base import TextGenerationFamily
from epmq_deploy.quantization.stage import calibration_samples, quantize
from epmq_deploy.recipe import DataSource, Recipe, override, parse_recipe

LONGEST = 5
two_kinds = pytest.mark.parametrize("merged_text_generator", ["flan-t5", "llama"], indirect=True)


def rows_of(recipe: Recipe, task: str) -> list[dict[str, Any]]:
    """Calibration data as stored."""
    source = recipe.tasks[task].calibration
    assert source is not None
    return [json.loads(line) for line in Path(source.path).read_text().splitlines()]


def with_data(
    recipe: Recipe, folder: Path, rows: Mapping[str, list[dict[str, Any]]], **source: Any
) -> Recipe:
    """The recipe with other calibration data, whose labels, where there are any, are texts."""
    folder.mkdir()
    content = recipe.model_dump()
    for task, held in rows.items():
        file = folder / f"{task}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in held) + "\n")
        content["tasks"][task]["calibration"] |= {"path": str(file), **source}
        content["tasks"][task]["prompt"] |= {"answers": None, "max_tokens": LONGEST}
    return parse_recipe(content, "test")


def unlabelled(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with all labels taken away."""
    rows = {task: rows_of(recipe, task) for task in recipe.tasks}
    for row in (row for held in rows.values() for row in held):
        del row["label"]
    return with_data(recipe, folder, rows)


def labelled_by_experts(merged: MergedTextGenerator, folder: Path) -> Recipe:
    """The recipe with every label what the task's expert writes, as ``transformers`` has it."""
    recipe, rows = merged.recipe, {}
    for task, given in recipe.tasks.items():
        model = merged.models.load(merged.models.expert(task))
        tokenizer = merged.family.tokenizer(merged.folder)
        assert given.prompt is not None
        assert given.prompt.template is not None
        rows[task] = rows_of(recipe, task)
        for row in rows[task]:
            text = given.prompt.template.format(**row)
            ids, _ = merged.family.prompts(merged.folder, [text])
            written = model.generate(ids, max_new_tokens=LONGEST, do_sample=False)[0]
            answer = written[1 if model.config.is_encoder_decoder else ids.shape[1] :]
            row["label"] = tokenizer.decode(answer, skip_special_tokens=True)
    return with_data(recipe, folder, rows)


def codes(recipe: Recipe, merged: MergedTextGenerator, output: Path) -> list[str]:
    """Hashes of what quantization gives."""
    outputs = quantize(recipe, merged.folder, output).outputs
    return [outputs[name] for name in ("quantized.safetensors", "replaced.safetensors")]


@two_kinds
@pytest.mark.parametrize("method", ["epmq", "gptq"])
def test_they_count_as_labels_would(
    merged_text_generator: MergedTextGenerator,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    method: str,
) -> None:
    def chosen(recipe: Recipe) -> Recipe:
        return parse_recipe(
            recipe.model_dump() | {"quantize": {"method": method, "group_size": 16}}, "test"
        )

    given = chosen(unlabelled(merged_text_generator.recipe, tmp_path / "unlabelled"))
    with caplog.at_level(logging.WARNING, "epmq_deploy.data"):
        found = codes(given, merged_text_generator, tmp_path / "out")
    assert [record.getMessage() for record in caplog.records if "answers" in record.msg] == [
        "calibration data without labels: experts' own answers take their place "
        "(first: 16, second: 16)"
    ]
    details = read_manifest(tmp_path / "out", "quantize").reported
    assert details["answers_by_experts"] == {"first": 16, "second": 16}
    known = chosen(labelled_by_experts(merged_text_generator, tmp_path / "labelled"))
    assert found == codes(known, merged_text_generator, tmp_path / "known")
    details = read_manifest(tmp_path / "known", "quantize").reported
    assert "answers_by_experts" not in details
    # The labels that were taken away are others.
    assert found != codes(
        chosen(merged_text_generator.recipe), merged_text_generator, tmp_path / "own"
    )


@two_kinds
@pytest.mark.parametrize("flags", [{"method": "regmean_pp"}, {"search": True}])
def test_merging_takes_them_too(
    merged_text_generator: MergedTextGenerator, tmp_path: Path, flags: dict[str, Any]
) -> None:
    given = unlabelled(merged_text_generator.recipe, tmp_path / "unlabelled")
    known = labelled_by_experts(merged_text_generator, tmp_path / "labelled")
    found, expected = (
        merge(override(recipe, "merge", flags), tmp_path / name)
        for recipe, name in ((given, "out"), (known, "known"))
    )
    details = found.reported
    assert details.pop("answers_by_experts") == {"first": 16, "second": 16}
    assert details == expected.reported
    assert found.outputs["model.safetensors"] == expected.outputs["model.safetensors"]


@pytest.mark.parametrize("merged_text_generator", ["t5"], indirect=True)
def test_labels_can_be_left_unread(
    merged_text_generator: MergedTextGenerator, tmp_path: Path
) -> None:
    recipe = merged_text_generator.recipe
    rows = {task: rows_of(recipe, task) for task in recipe.tasks}
    ignored = with_data(recipe, tmp_path / "data", rows, label_column=None)
    bare = unlabelled(recipe, tmp_path / "bare")
    assert codes(ignored, merged_text_generator, tmp_path / "a") == codes(
        bare, merged_text_generator, tmp_path / "b"
    )


@pytest.mark.parametrize("merged_text_generator", ["t5"], indirect=True)
def test_answers_belong_to_rows(merged_text_generator: MergedTextGenerator, tmp_path: Path) -> None:
    """Whichever of them are chosen, and in whatever order."""
    recipe = unlabelled(merged_text_generator.recipe, tmp_path / "unlabelled")
    family, folder = merged_text_generator.family, merged_text_generator.folder
    experts = ExpertBackbone(open_sources(recipe), torch.device("cpu"))
    samples = calibration_samples(recipe, family, folder)
    written = write_answers(samples, family, folder, experts.become)
    answered = with_answers(samples, written)["first"]
    assert isinstance(answered, TextSamples)
    assert list(answered.indices) != sorted(answered.indices)
    known = labelled_by_experts(merged_text_generator, tmp_path / "labelled")
    labels = [row["label"] for row in rows_of(known, "first")]
    found = [pair.answer for pair in answered.inputs(3, 9)]
    assert found == [labels[row] for row in answered.indices[3:9]]


@pytest.mark.parametrize("merged_text_generator", ["t5"], indirect=True)
def test_a_killed_run_does_not_write_them_again(
    merged_text_generator: MergedTextGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = unlabelled(merged_text_generator.recipe, tmp_path / "unlabelled")
    whole = codes(recipe, merged_text_generator, tmp_path / "whole")
    killed_in(1, recipe, merged_text_generator.folder, tmp_path / "resumed", monkeypatch)
    monkeypatch.setattr(TextGenerationFamily, "write", None)
    assert codes(recipe, merged_text_generator, tmp_path / "resumed") == whole


@pytest.mark.parametrize("merged_text_generator", ["t5"], indirect=True)
def test_evaluation_needs_labels_and_names_are_taken_at_their_word(
    merged_text_generator: MergedTextGenerator, tmp_path: Path
) -> None:
    recipe = unlabelled(merged_text_generator.recipe, tmp_path / "data")
    source = recipe.tasks["first"].calibration
    assert source is not None
    with pytest.raises(RecipeError, match="has no column 'label'"):
        load_samples(
            "first", source, merged_text_generator.family, prompt=recipe.tasks["first"].prompt
        )
    none = DataSource(path=source.path, label_column=None)
    with pytest.raises(RecipeError, match="label_column is not set"):
        load_samples(
            "first", none, merged_text_generator.family, prompt=recipe.tasks["first"].prompt
        )
    rows = {task: rows_of(recipe, task) for task in recipe.tasks}
    wrong = with_data(recipe, tmp_path / "wrong", rows, label_column="answer")
    with pytest.raises(MismatchError, match="has no column 'answer'"):
        calibration_samples(wrong, merged_text_generator.family, merged_text_generator.folder)
