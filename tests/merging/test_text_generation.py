"""Merging text-generation models with calibration data, against plain references."""

from pathlib import Path
from typing import Any

import pytest
import torch
from merge_references import plain_regmean, seen_by
from merged_text_generators import MergedTextGenerator, plain_scores
from safetensors.torch import load_file
from tiny_text_generators import TEXT_TASKS
from torch import Tensor, nn

from epmq_deploy.data.loading import load_samples
from epmq_deploy.merging.stage import merge
from epmq_deploy.models.text_generation.base import TextPair
from epmq_deploy.recipe import Recipe, override

METHODS: dict[str, dict[str, Any]] = {
    "regmean": {},
    "regmean_pp": {},
    "fisher": {"labels": 2},
    "adamerging": {"initial": 1, "steps": 0},
}
SAMPLES = 4
two_kinds = pytest.mark.parametrize("merged_text_generator", ["flan-t5", "llama"], indirect=True)


def recipe_of(merged: MergedTextGenerator, method: str, **options: Any) -> Recipe:
    flags = {"method": method, "samples": SAMPLES, **options}
    return override(merged.recipe, "merge", flags)


def merged_by(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    merge(recipe, folder)
    return load_file(folder / "model.safetensors")


def with_experts(recipe: Recipe, *experts: str) -> Recipe:
    """The recipe with the experts of these tasks for its first tasks, which are all it has."""
    tasks = {
        name: task.model_copy(update={"expert": recipe.tasks[other].expert})
        for (name, task), other in zip(recipe.tasks.items(), experts, strict=False)
    }
    return recipe.model_copy(update={"tasks": tasks})


def pairs_of(merged: MergedTextGenerator, task: str) -> list[TextPair]:
    given = merged.recipe.tasks[task]
    assert given.calibration is not None
    family = merged.family
    samples = load_samples(task, given.calibration, family, prompt=given.prompt, limit=SAMPLES)
    return samples.inputs(0, SAMPLES)


def plain_inputs(merged: MergedTextGenerator, pair: TextPair) -> dict[str, Tensor]:
    """What ``transformers`` takes for one sample; nothing is padded."""
    named = zip(
        merged.family.input_names, merged.family.collate(merged.folder, [pair]), strict=True
    )
    return {name: value for name, value in named if name != "answer_mask"} | {"use_cache": False}


def experts_of(merged: MergedTextGenerator) -> dict[str, nn.Module]:
    return {task: merged.models.load(merged.models.expert(task)) for task in TEXT_TASKS}


def layers_of(merged: MergedTextGenerator, model: nn.Module) -> list[str]:
    return [name for block in merged.family.blocks(model) for name in block.layers]


def rows_seen(runs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([run[name] for run in runs]) for name in runs[0]}


@two_kinds
def test_regmean_equals_the_plain_reference(
    merged_text_generator: MergedTextGenerator, tmp_path: Path
) -> None:
    """Of encoder, decoder and cross attention; padding does not count."""
    found = merged_by(
        recipe_of(merged_text_generator, "regmean", off_diagonal=0.7), tmp_path / "merged"
    )
    rows, weights = [], []
    for task, model in experts_of(merged_text_generator).items():
        layers = {
            name: model.get_submodule(name) for name in layers_of(merged_text_generator, model)
        }
        runs = [
            seen_by(lambda m=model, p=pair: m(**plain_inputs(merged_text_generator, p)), layers)  # type: ignore[misc]
            for pair in pairs_of(merged_text_generator, task)
        ]
        rows.append(rows_seen(runs))
        weights.append(model.state_dict())
    for name in rows[0]:
        expected = plain_regmean(
            [held[f"{name}.weight"] for held in weights], [seen[name] for seen in rows], 0.7
        )
        assert torch.allclose(found[f"{name}.weight"], expected, atol=1e-3), name
    means = {name: torch.stack([held[name] for held in weights]).mean(dim=0) for name in weights[0]}
    others = [name for name in found if name.removesuffix(".weight") not in rows[0]]
    assert others
    assert all(torch.allclose(found[name], means[name], atol=1e-6) for name in others)


@two_kinds
def test_regmean_plus_plus_takes_what_the_merged_model_gives(
    merged_text_generator: MergedTextGenerator, tmp_path: Path
) -> None:
    """Experts' blocks, run on what the finished merged model's blocks receive."""
    recipe = recipe_of(merged_text_generator, "regmean_pp", off_diagonal=0.9)
    found = merged_by(recipe, tmp_path / "merged")
    student = merged_text_generator.models.load(tmp_path / "merged")
    experts = experts_of(merged_text_generator)
    blocks = merged_text_generator.family.blocks(student)
    received: dict[tuple[str, str], list[Any]] = {}
    for task in TEXT_TASKS:
        for pair in pairs_of(merged_text_generator, task):
            hooks = [
                student.get_submodule(block.name).register_forward_pre_hook(
                    lambda module, args, kwargs, key=(task, block.name): received.setdefault(
                        key, []
                    ).append((args, kwargs)),
                    with_kwargs=True,
                )
                for block in blocks
            ]
            with torch.no_grad():
                student(**plain_inputs(merged_text_generator, pair))
            for hook in hooks:
                hook.remove()
    for block in blocks:
        rows = []
        for task, model in experts.items():
            own = model.get_submodule(block.name)
            layers = {name: model.get_submodule(name) for name in block.layers}
            runs = [
                seen_by(lambda o=own, a=args, k=kwargs: o(*a, **k), layers)  # type: ignore[misc]
                for args, kwargs in received[task, block.name]
            ]
            rows.append(rows_seen(runs))
        for name in block.layers:
            weights = [model.get_parameter(f"{name}.weight") for model in experts.values()]
            expected = plain_regmean(weights, [seen[name] for seen in rows], 0.9)
            assert torch.allclose(found[f"{name}.weight"], expected, atol=5e-3), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("merged_text_generator", ["t5", "flan-t5", "qwen2"], indirect=True)
def test_one_expert_is_itself(
    merged_text_generator: MergedTextGenerator, tmp_path: Path, method: str
) -> None:
    recipe = recipe_of(merged_text_generator, method, **METHODS[method])
    first = recipe.model_copy(update={"tasks": {"first": recipe.tasks["first"]}})
    expert = merged_text_generator.models.load(
        merged_text_generator.models.expert("first")
    ).state_dict()
    for name, value in merged_by(first, tmp_path / "merged").items():
        assert torch.allclose(value, expert[name], atol=1e-5), name


@pytest.mark.parametrize("method", ["regmean", "regmean_pp", "fisher"])
@two_kinds
def test_identical_experts_are_themselves(
    merged_text_generator: MergedTextGenerator, tmp_path: Path, method: str
) -> None:
    recipe = with_experts(
        recipe_of(merged_text_generator, method, **METHODS[method]), "second", "second"
    )
    expert = merged_text_generator.models.load(
        merged_text_generator.models.expert("second")
    ).state_dict()
    for name, value in merged_by(recipe, tmp_path / "merged").items():
        assert torch.allclose(value, expert[name], atol=1e-5), name


def plain_fisher(
    merged: MergedTextGenerator, model: nn.Module, pairs: list[TextPair]
) -> list[Tensor]:
    """Token by token and word by word: mean squared gradients of log-probabilities."""
    total = [torch.zeros_like(value) for value in model.parameters()]
    for pair in pairs:
        scores = plain_scores(merged, model, pair)
        for score in scores.flatten():
            gradients = torch.autograd.grad(
                score, list(model.parameters()), retain_graph=True, allow_unused=True
            )
            for value, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    value += score.detach().exp() * gradient**2 / len(pairs)
    return total


@two_kinds
def test_fisher_equals_the_plain_reference(
    merged_text_generator: MergedTextGenerator, tmp_path: Path
) -> None:
    recipe = recipe_of(merged_text_generator, "fisher", labels=0, samples=2)
    found = merged_by(recipe, tmp_path / "merged")
    experts = experts_of(merged_text_generator)
    given = {}
    for task in TEXT_TASKS:
        source = recipe.tasks[task].calibration
        assert source is not None
        prompt = recipe.tasks[task].prompt
        drawn = load_samples(task, source, merged_text_generator.family, prompt=prompt, limit=2)
        given[task] = drawn.inputs(0, 2)
    fishers = [
        plain_fisher(merged_text_generator, model, given[task]) for task, model in experts.items()
    ]
    norms = [torch.cat([value.flatten() for value in own]).norm() for own in fishers]
    names = [name for name, _ in experts["first"].named_parameters()]
    for place, name in enumerate(names):
        weights = [
            own[place].clamp(min=1e-6) / norm for own, norm in zip(fishers, norms, strict=True)
        ]
        values = [model.get_parameter(name) for model in experts.values()]
        top = torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(dim=0)
        expected = top / torch.stack(weights).sum(dim=0)
        assert torch.allclose(found[name], expected, atol=1e-3), name


@pytest.mark.parametrize("merged_text_generator", ["llama"], indirect=True)
def test_drawn_words_give_the_expectation(
    merged_text_generator: MergedTextGenerator, tmp_path: Path
) -> None:
    norms = [
        merge(
            recipe_of(merged_text_generator, "fisher", labels=labels, samples=2),
            tmp_path / str(labels),
        ).reported["fisher_norms"]
        for labels in (0, 60)
    ]
    for task in TEXT_TASKS:
        assert norms[1][task] == pytest.approx(norms[0][task], rel=0.2)


@two_kinds
def test_adamerging_lowers_the_entropy_it_reports(
    merged_text_generator: MergedTextGenerator, tmp_path: Path
) -> None:
    recipe = recipe_of(merged_text_generator, "adamerging", steps=10, learning_rate=0.02)
    details = merge(recipe, tmp_path / "merged").reported
    model = merged_text_generator.models.load(tmp_path / "merged")
    means = []
    for task in TEXT_TASKS:
        entropies = []
        for pair in pairs_of(merged_text_generator, task):
            with torch.no_grad():
                scores = plain_scores(merged_text_generator, model, pair)
            entropies.append(float(-(scores.exp() * scores).sum(dim=1).mean()))
        means.append(sum(entropies) / len(entropies))
    assert details["entropy_after"] == pytest.approx(sum(means) / len(means), rel=1e-3)
    assert details["entropy_after"] < details["entropy_before"]
