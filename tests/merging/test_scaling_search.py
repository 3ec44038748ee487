"""The search for a scaling."""

import math
from pathlib import Path

import pytest
import torch
from tiny_zoo import TinyZoo

from epmq_deploy.data.agreement import predictions_of, tune
from epmq_deploy.data.heads import build_heads
from epmq_deploy.data.loading import load_samples
from epmq_deploy.errors import MismatchError
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.models.problem_types import divergence
from epmq_deploy.recipe import Recipe, load_recipe, override


def measured(recipe: Recipe, folder: Path, samples: int, objective: str = "experts") -> float:
    """Mean loss of the model in ``folder``, computed the plain way."""
    family = family_of(folder)
    model = family.load(folder)
    base = Path(recipe.base.path)
    heads = build_heads(recipe.tasks, family, base, family.embedding_width(model, base))
    experts = ExpertBackbone(open_sources(recipe), torch.device("cpu"))
    total = 0.0
    for name, task in recipe.tasks.items():
        assert task.calibration is not None
        chosen = load_samples(name, task.calibration, family, limit=samples)
        found = predictions_of(model, family, folder, chosen, heads[name])
        chances = found.logits.softmax(dim=1)
        if objective == "labels":
            rows = torch.arange(len(chosen))
            total -= float(chances[rows, chosen.labels().numbers].log().mean())
        elif objective == "entropy":
            total -= float((chances * chances.log()).sum(dim=1).mean())
        else:
            wanted = predictions_of(experts.become(name), family, base, chosen, heads[name])
            total += float(divergence(found.logits, wanted.logits).mean())
    return total / len(recipe.tasks)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv_m"])
def test_reports_the_divergence_of_the_models_it_would_merge(
    tiny: TinyZoo, tmp_path: Path, method: str
) -> None:
    flags = {"method": method, "search": True, "search_samples": 8, "layers": ["*.bias:scaling=0"]}
    searched = override(load_recipe(tiny.recipe), "merge", flags)
    manifest = merge(searched, tmp_path / "searched")
    curve = {item["scaling"]: item["loss"] for item in manifest.reported["search"]}
    assert len(curve) >= 5
    assert list(curve) == sorted(curve)
    found = manifest.reported["scaling"]
    start = searched.merge.model_dump()["scaling"]
    assert found == start or curve[found] == min(curve.values())
    assert measured(searched, tmp_path / "searched", 8) == pytest.approx(curve[found], rel=1e-3)
    other = min(curve)
    plain = override(searched, "merge", {"search": False, "scaling": other})
    merge(plain, tmp_path / "plain")
    assert measured(plain, tmp_path / "plain", 8) == pytest.approx(curve[other], rel=1e-3)


def test_every_missing_part_is_named_and_nothing_is_written(tiny: TinyZoo, tmp_path: Path) -> None:
    recipe = override(load_recipe(tiny.recipe), "merge", {"search": True})
    tasks = dict(recipe.tasks)
    tasks["red"] = tasks["red"].model_copy(update={"calibration": None})
    tasks["blue"] = tasks["blue"].model_copy(update={"head": None})
    with pytest.raises(MismatchError) as caught:
        merge(recipe.model_copy(update={"tasks": tasks}), tmp_path / "merged")
    assert caught.value.problems == (
        "task 'red' has no calibration data, which merge.search needs",
        "task 'blue' has no head, which merge.search needs",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("objective", ["labels", "entropy"])
def test_other_objectives_judge_the_model_they_would_merge(
    tiny: TinyZoo, tmp_path: Path, objective: str
) -> None:
    flags = {"search": True, "search_samples": 8, "search_objective": objective}
    searched = override(load_recipe(tiny.recipe), "merge", flags)
    manifest = merge(searched, tmp_path / "searched")
    curve = {item["scaling"]: item["loss"] for item in manifest.reported["search"]}
    found = manifest.reported["scaling"]
    loss = measured(searched, tmp_path / "searched", 8, objective)
    assert loss == pytest.approx(curve[found], rel=1e-3)


def test_labels_to_search_by_must_be_there(tiny: TinyZoo, tmp_path: Path) -> None:
    flags = {"search": True, "search_objective": "labels"}
    recipe = override(load_recipe(tiny.recipe), "merge", flags)
    tasks = {
        name: task.model_copy(
            update={"calibration": task.calibration.model_copy(update={"label_column": column})}
        )
        for (name, task), column in zip(recipe.tasks.items(), ("no", "label", "nor"), strict=True)
    }
    with pytest.raises(MismatchError, match=r"no column 'no'.*\n?.*no column 'nor'"):
        merge(recipe.model_copy(update={"tasks": tasks}), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("best", [0.08, 0.3, 0.55, 2.0])
def test_walks_to_the_least_divergence_and_looks_closer(best: float) -> None:
    def score(scaling: float) -> dict[str, torch.Tensor]:
        return {"t": torch.full((4,), math.log(scaling / best) ** 2)}

    found = tune(score, 0.3, factor=1.5, steps=6, finer=True)
    assert abs(math.log(found.value / best)) <= math.log(1.5) / 4 + 1e-9
    assert found.value in found.curve


def test_noise_does_not_move_the_scaling() -> None:
    generator = torch.Generator().manual_seed(0)

    def score(scaling: float) -> dict[str, torch.Tensor]:
        return {"t": torch.rand(6, generator=generator) + 0.01 * abs(scaling - 0.4)}

    found = tune(score, 0.3, factor=1.5, steps=2)
    gain = found.curve[0.3] - found.curve[found.value]
    assert found.value == 0.3 or gain > found.standard_error
