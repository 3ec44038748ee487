"""What graphs of text-generation models are compared on: a task's own texts, and a real past."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_text_generators import TEXT_GENERATORS, TEXT_TASKS, build_tiny_text_generators
from torch import Tensor

from epmq_deploy.data.loading import load_samples
from epmq_deploy.exporters.graphs import text_generation as module
from epmq_deploy.exporters.graphs.text_generation import (
    TextGenerationGraph,
    comparison_inputs,
    text_generation_graphs,
)
from epmq_deploy.exporters.verification.parity import parity_inputs
from epmq_deploy.models import family_of
from epmq_deploy.models.text_generation.base import TextPair
from epmq_deploy.recipe import load_recipe

Case = tuple[Any, tuple[TextGenerationGraph, ...], list[Sequence[tuple[Tensor, ...]]], Any]


def case_of(folder: Path, name: str) -> Case:
    """The family, the graphs, each one's calls, and the recipe of a tiny model."""
    models = build_tiny_text_generators(folder, TEXT_GENERATORS[name])
    family, recipe = family_of(models.base), load_recipe(models.recipe)
    example = family.example_inputs(models.base, 2)
    found = parity_inputs(recipe.tasks, family, models.base, example)
    assert (found.kind, found.missing) == ("calibration", {})
    graphs = text_generation_graphs(family, family.load(models.base).eval())  # type: ignore[arg-type]
    return family, graphs, [comparison_inputs(graph, found).batches for graph in graphs], recipe


def run(graph: TextGenerationGraph, call: tuple[Tensor, ...]) -> Tensor:
    """The first output."""
    with torch.inference_mode():
        return graph(*call)[0]


@pytest.mark.parametrize("name", ["t5", "flan-t5"])
def test_an_encoder_decoder_s_calls_are_one_answer_being_written(tmp_path: Path, name: str) -> None:
    family, graphs, calls, recipe = case_of(tmp_path, name)
    folder = tmp_path / "base"
    for index, task in enumerate(TEXT_TASKS):
        given = recipe.tasks[task]
        samples = load_samples(task, given.calibration, family, prompt=given.prompt, limit=4)
        pairs = samples.inputs(0, 4)
        ids, mask, answers, _ = family.collate(folder, pairs)
        read, first, further = (of_graph[index] for of_graph in calls)
        assert torch.equal(read[0], ids)
        assert torch.equal(read[1], mask)
        assert torch.equal(first[1], answers)
        with torch.inference_mode():
            whole = (
                graphs[0]
                .backbone(
                    input_ids=ids,
                    attention_mask=mask,
                    decoder_input_ids=torch.cat([answers, answers[:, -1:]], dim=1),
                )
                .logits
            )
        assert torch.allclose(run(graphs[1], first), whole[:, :-1], atol=1e-4)
        assert torch.allclose(run(graphs[2], further), whole[:, -1:], atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_decoder_s_calls_begin_without_a_past_and_go_on(tmp_path: Path, name: str) -> None:
    family, (graph,), (calls,), recipe = case_of(tmp_path, name)
    for index, task in enumerate(TEXT_TASKS):
        given = recipe.tasks[task]
        samples = load_samples(task, given.calibration, family, prompt=given.prompt, limit=4)
        ids, mask, *_ = family.collate(tmp_path / "base", samples.inputs(0, 4))
        begun, further = calls[2 * index : 2 * index + 2]
        assert torch.equal(begun[0], ids)
        assert begun[3].shape[2] == 0
        assert further[3].shape[2] == ids.shape[1]
        lengths = mask.sum(dim=1)
        assert len(set(lengths.tolist())) > 1, "nothing is padded"
        for row, length in enumerate(lengths.tolist()):
            alone = torch.cat([ids[row, :length], ids[row, -1:]])[None]
            with torch.inference_mode():
                whole = graph.backbone(input_ids=alone).logits[0]
            assert torch.allclose(run(graph, begun)[row, :length], whole[:-1], atol=1e-4)
            assert torch.allclose(run(graph, further)[row, 0], whole[-1], atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_long_texts_are_cut(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST", 3)
    _, graphs, calls, _ = case_of(tmp_path, name)
    for graph, of_graph in zip(graphs, calls, strict=True):
        for call in of_graph:
            named = dict(zip(graph.input_names, call, strict=True))
            assert named["input_ids"].shape[1] <= 3
            assert all(value.shape[2] <= 3 for value in call if value.dim() == 4)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_texts_need_no_answers(tmp_path: Path, name: str) -> None:
    models = build_tiny_text_generators(tmp_path, TEXT_GENERATORS[name])
    family, recipe = family_of(models.base), load_recipe(models.recipe)
    example = family.example_inputs(models.base, 2)
    without = {
        task: given.model_copy(
            update={"calibration": given.calibration.model_copy(update={"label_column": None})}
        )
        for task, given in recipe.tasks.items()
    }
    found = parity_inputs(without, family, models.base, example)
    assert (found.kind, found.missing) == ("calibration", {})
    for batch, (task, given) in zip(found.batches, recipe.tasks.items(), strict=True):
        samples = load_samples(task, given.calibration, family, prompt=given.prompt, limit=4)
        pairs = [TextPair(pair.text, "") for pair in samples.inputs(0, 4)]
        expected = family.collate(models.base, pairs)
        assert all(torch.equal(*values) for values in zip(batch, expected, strict=True))
    for graph in text_generation_graphs(family, family.load(models.base).eval()):  # type: ignore[arg-type]
        for call in comparison_inputs(graph, found).batches:
            assert bool(run(graph, call).isfinite().all())
