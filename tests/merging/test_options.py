"""Options of merge methods: what differs between tensors, and what does not fit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from task_vectors import merged, random_vectors

from epmq_deploy.errors import RecipeError
from epmq_deploy.merging.base import Calibrated, FromData
from epmq_deploy.merging.methods import MERGE_METHODS
from epmq_deploy.merging.methods.ties import TiesOptions
from epmq_deploy.merging.stage import check_options
from epmq_deploy.recipe import Recipe, override, parse_recipe


def recipe(tasks: int, **merge: Any) -> Recipe:
    experts = {f"t{index}": {"expert": "e"} for index in range(tasks)}
    return parse_recipe({"base": {"path": "b"}, "tasks": experts, "merge": merge}, "recipe.yaml")


def test_every_method_names_its_source() -> None:
    assert len(MERGE_METHODS) >= 16
    for name, method in MERGE_METHODS.items():
        assert method.name == name
        assert "arXiv 2" in method.source or "Shoemake 1985" in method.source


def test_options_by_layer_hold_for_the_tensors_named() -> None:
    vectors = random_vectors(2)
    layers = {"fc.*": {"scaling": 0.5}, "*.bias": {"scaling": 0.25}}
    found = merged("task_arithmetic", vectors, scaling=1.0, layers=layers)
    factors = {"fc.weight": 0.5, "fc.bias": 0.25, "conv.weight": 1.0, "scale": 1.0}
    for name, factor in factors.items():
        assert torch.allclose(found[name], factor * vectors.tensors[name].sum(dim=0), atol=1e-6)


def test_options_by_layer_and_weights_are_read_from_flags() -> None:
    flags = {"method": "ties", "layers": ["*.fc1.*:density=0.5,combine=mean"]}
    options = override(recipe(1), "merge", flags).merge
    assert isinstance(options, TiesOptions)
    own = options.for_tensor("a.fc1.weight")
    assert (own.density, own.combine, own.scaling) == (0.5, "mean", options.scaling)
    assert options.for_tensor("a.fc2.weight") is options
    weighted = override(recipe(2), "merge", {"weights": ["t0=0.5", "t1=2"]})
    assert weighted.merge.model_dump()["weights"] == {"t0": 0.5, "t1": 2.0}


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (
            {"layers": {"*": {"colour": 1}}},
            "layers.*: colour cannot be set by layer; task_arithmetic allows weights, scaling",
        ),
        ({"method": "dare", "layers": {"*": {"seed": 1}}}, "seed cannot be set by layer"),
        (
            {"method": "ties", "layers": {"*.fc1": {"density": 2}}},
            "layers.*.fc1.density: Input should be less than or equal to 1",
        ),
        ({"layers": ["fc1=3"]}, "not of the form PATTERN:option=value"),
        ({"weights": ["t0"]}, "'t0' is not of the form NAME=NUMBER"),
        ({"weights": {"t0": "x"}}, "merge.weights.t0: Input should be a valid number"),
        ({"method": "della", "density": 0.05}, "must be probabilities"),
        ({"method": "average", "search": True}, "merge.search: no such option"),
        (
            {"search": True, "scaling": -1},
            "scaling must be positive with search, which starts from it",
        ),
    ],
)
def test_wrong_options_are_named(merge: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(2, **merge)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("tasks", "merge", "message"),
    [
        (3, {"method": "slerp"}, "slerp merges exactly two experts, the recipe has 3"),
        (1, {"method": "slerp"}, "slerp merges exactly two experts, the recipe has 1"),
        (1, {"method": "model_stock"}, "it needs at least two"),
        (1, {"method": "consensus"}, "merge.active_tasks is 2, but there are 1 experts"),
        (2, {"weights": {"t0": 1, "t1": 1, "x": 1}}, "merge.weights names x; tasks are t0, t1"),
        (2, {"weights": {"t0": 1}}, "merge.weights lacks t1; give a weight for every task"),
        (
            2,
            {"method": "average", "weights": {"t0": 1, "t1": -1}},
            "merge.weights must have a positive sum",
        ),
        (
            2,
            {"method": "consensus", "layers": {"*": {"active_tasks": 5}}},
            "merge.active_tasks is 5, but there are 2 experts",
        ),
    ],
)
def test_options_that_do_not_fit_the_tasks_are_named(
    tasks: int, merge: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        check_options(recipe(tasks, **merge))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_method_keeps_only_what_means_the_same() -> None:
    first = recipe(2, scaling=0.7, dtype="float32", search=True)
    changed = override(first, "merge", {"method": "iso_c"}).merge.model_dump()
    assert (changed["dtype"], changed["search"]) == ("float32", True)
    assert changed["scaling"] == MERGE_METHODS["iso_c"].options().scaling


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_that_would_drop_everything_are_refused(method: str) -> None:
    recipe(2, method=method, beta=0.5, gamma=0.51)
    for gamma in (0.5, 0.4):
        with pytest.raises(RecipeError, match=r"gamma .* must be above beta 0.5"):
            recipe(2, method=method, beta=0.5, gamma=gamma)
    with pytest.raises(RecipeError, match=r"layers\.\*: gamma 0.993 must be above beta 0.995"):
        recipe(2, method=method, layers={"*": {"beta": 0.995}})


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ({"search_samples": 64}, "merge.search_samples has no effect without merge.search"),
        (
            {"method": "wudi", "solver": "exact", "steps": 300},
            "merge.steps has no effect with merge.solver: exact",
        ),
        (
            {"method": "wudi", "solver": "exact", "learning_rate": 0.1},
            "merge.learning_rate has no effect with merge.solver: exact",
        ),
        (
            {"method": "wudi", "layers": {"*.a": {"solver": "exact", "steps": 5}}},
            "merge.layers.*.a.steps has no effect with merge.solver: exact",
        ),
    ],
)
def test_options_without_effect_are_refused_where_they_were_given(
    merge: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        check_options(recipe(2, **merge))
    assert str(caught.value).startswith(message)
    flags = {key: value for key, value in merge.items() if key != "method"}
    plain = recipe(2, method=merge.get("method", "ties"))
    with pytest.raises(RecipeError, match="has no effect"):
        check_options(override(plain, "merge", flags))


@pytest.mark.parametrize(
    "merge",
    [
        {"method": "ties"},
        {"search": True, "search_samples": 8},
        {"method": "wudi", "solver": "exact"},
        {"method": "wudi", "solver": "exact", "layers": {"*.a": {"solver": "adam"}}, "steps": 5},
        {"method": "wudi", "steps": 5, "layers": {"*.a": {"solver": "exact"}}},
    ],
)
def test_defaults_and_options_of_some_tensors_are_not_refused(merge: dict[str, Any]) -> None:
    check_options(recipe(2, **merge))
    check_options(override(recipe(2, **merge), "merge", {"dtype": "float32"}))
    check_options(override(recipe(2, **merge), "eval", {"threads": (1,)}))


def test_flags_put_options_of_the_recipe_out_of_use() -> None:
    searched = recipe(2, search=True, search_samples=8)
    plain = override(searched, "merge", {"search": False})
    check_options(plain)
    assert not plain.merge.model_dump()["search"]
    stepped = recipe(2, method="wudi", steps=5)
    check_options(override(stepped, "merge", {"solver": "exact"}))
    assert override(stepped, "merge", {"dtype": "float32"}).merge.model_dump()["steps"] == 5
    with pytest.raises(RecipeError, match=r"merge\.steps has no effect"):
        check_options(override(stepped, "merge", {"solver": "exact", "steps": 5}))


def test_options_made_in_python_keep_their_method() -> None:
    chosen = recipe(2).model_copy(update={"merge": MERGE_METHODS["ties"].options()})
    assert override(chosen, "eval", {"threads": (1,)}).merge.method == "ties"


def test_statistics_from_data_need_options_that_ask_for_data() -> None:
    def compute(*_: object) -> Calibrated[None]:
        return Calibrated(None)

    with pytest.raises(TypeError, match="TiesOptions: statistics from data need DataOptions"):
        replace(MERGE_METHODS["ties"], statistics=FromData(compute))
