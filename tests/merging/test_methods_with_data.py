"""Merge methods that need calibration data, against plain references on a tiny CLIP."""

from pathlib import Path
from typing import Any

import pytest
import torch
from merge_references import plain_esm, plain_regmean, seen_by
from safetensors.torch import load_file
from tiny_text import TinyText
from tiny_zoo import TASKS, TinyZoo
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from epmq_deploy.data.heads import build_heads
from epmq_deploy.data.loading import load_samples
from epmq_deploy.data.samples import batches
from epmq_deploy.errors import MismatchError, NumericsError, RecipeError
from epmq_deploy.merging.methods.fisher import fisher_mean
from epmq_deploy.merging.regression import regression_mean, shrink_off_diagonal
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import TaskHead, family_of
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.models.problem_types import entropy
from epmq_deploy.recipe import Recipe, load_recipe, override

DATA_METHODS = ("regmean", "regmean_pp", "fisher", "adamerging", "esm")
QUICK: dict[str, dict[str, Any]] = {
    "regmean": {},
    "regmean_pp": {},
    "fisher": {"labels": 0},
    "adamerging": {"steps": 3},
    "esm": {},
}
SAMPLES = 6
BLOCK = "vision_model.encoder.layers"
LAYERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)


def recipe_of(tiny: TinyZoo, method: str, **options: Any) -> Recipe:
    flags = {"method": method, "samples": SAMPLES, **options}
    return override(load_recipe(tiny.recipe), "merge", flags)


def merged(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    """The merged image tower, by name."""
    merge(recipe, folder)
    tensors = load_file(folder / "model.safetensors")
    return {name: value for name, value in tensors.items() if name.startswith("vision_model.")}


def expert_of(recipe: Recipe, task: str) -> nn.Module:
    """An expert on its own."""
    return ExpertBackbone(open_sources(recipe), torch.device("cpu")).become(task)


def pixels_of(recipe: Recipe, task: str) -> Tensor:
    base = Path(recipe.base.path)
    source = recipe.tasks[task].calibration
    assert source is not None
    samples = load_samples(task, source, family_of(base), limit=SAMPLES)
    return torch.cat([inputs[0] for inputs in batches(samples, family_of(base), base, SAMPLES)])


def head_of(recipe: Recipe, task: str) -> TaskHead:
    base = Path(recipe.base.path)
    family = family_of(base)
    width = family.embedding_width(family.load(base), base)
    return build_heads({task: recipe.tasks[task]}, family, base, width)[task]


def only(recipe: Recipe, *tasks: str) -> Recipe:
    return recipe.model_copy(update={"tasks": {task: recipe.tasks[task] for task in tasks}})


def test_regression_mean_is_the_formula_and_takes_the_mean_where_nothing_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 4, generator=generator) for _ in range(3)]
    rows = [torch.randn(20, 4, generator=generator).double() for _ in range(3)]
    grams = [shrink_off_diagonal((x.T @ x / 20).float(), 0.7) for x in rows]
    mean = torch.stack(weights).mean(dim=0)
    cross = torch.stack([w @ g for w, g in zip(weights, grams, strict=True)]).sum(dim=0)
    found = regression_mean(mean, cross, torch.stack(grams).sum(dim=0))
    assert torch.allclose(found, plain_regmean(weights, rows, 0.7), atol=1e-5)
    equal = torch.eye(4)
    assert torch.allclose(regression_mean(mean, 3 * mean @ equal, 3 * equal), mean, atol=1e-6)
    # Nothing reaches the last two columns.
    some = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0]))
    found = regression_mean(mean, weights[0] @ some, some)
    assert torch.allclose(found[:, :2], weights[0][:, :2], atol=1e-4)
    assert torch.equal(found[:, 2:], mean[:, 2:])
    assert torch.equal(regression_mean(mean, 0 * mean, torch.zeros(4, 4)), mean)


@pytest.mark.parametrize("factor", [0.6, 0.95])
def test_regmean_equals_the_plain_reference(tiny: TinyZoo, tmp_path: Path, factor: float) -> None:
    recipe = recipe_of(tiny, "regmean", off_diagonal=factor, batch_size=4)
    found = merged(recipe, tmp_path / "merged")
    rows, weights = [], []
    for task in TASKS:
        model = expert_of(recipe, task)
        layers = {f"{BLOCK}.{i}.{name}": None for i in (0, 1) for name in LAYERS}
        modules = {name: model.get_submodule(name) for name in layers}
        pixels = pixels_of(recipe, task)
        rows.append(seen_by(lambda model=model, pixels=pixels: model(pixels), modules))  # type: ignore[misc]
        weights.append(dict(model.state_dict()))
    for name in rows[0]:
        expected = plain_regmean(
            [held[f"{name}.weight"] for held in weights], [seen[name] for seen in rows], factor
        )
        assert torch.allclose(found[f"{name}.weight"], expected, atol=2e-4), name
        means = torch.stack([held[f"{name}.bias"] for held in weights]).mean(dim=0)
        assert torch.allclose(found[f"{name}.bias"], means, atol=1e-6)


def test_regmean_plus_plus_equals_the_plain_reference(tiny: TinyZoo, tmp_path: Path) -> None:
    recipe = recipe_of(tiny, "regmean_pp", off_diagonal=0.9)
    found = merged(recipe, tmp_path / "merged")
    experts = {task: expert_of(recipe, task) for task in TASKS}
    student = expert_of(recipe, TASKS[0])
    names = list(dict(student.named_parameters()))
    for name in names:
        mean = torch.stack([model.get_parameter(name) for model in experts.values()]).mean(dim=0)
        student.get_parameter(name).data = mean
    entry = student.get_submodule("vision_model")
    with torch.no_grad():
        hidden = {
            task: entry.pre_layrnorm(entry.embeddings(pixels_of(recipe, task))) for task in TASKS
        }
        for index in (0, 1):
            block = student.get_submodule(f"{BLOCK}.{index}")
            rows = {}
            for task, model in experts.items():
                own = model.get_submodule(f"{BLOCK}.{index}")
                layers = {name: own.get_submodule(name) for name in LAYERS}
                run = lambda own=own, task=task: own(hidden[task], None)  # noqa: E731
                rows[task] = seen_by(run, layers)
            for name in LAYERS:
                weights = [
                    model.get_submodule(f"{BLOCK}.{index}.{name}").weight
                    for model in experts.values()
                ]
                merged_weight = plain_regmean(weights, [rows[task][name] for task in TASKS], 0.9)
                block.get_submodule(name).weight.data = merged_weight
            for task in TASKS:
                output = block(hidden[task], None)
                hidden[task] = output[0] if isinstance(output, tuple) else output
    for name in names:
        if name in found:
            assert torch.allclose(found[name], student.get_parameter(name), atol=5e-4), name


@pytest.mark.parametrize("power", [0.0, 2.0])
def test_esm_equals_the_plain_reference(tiny: TinyZoo, tmp_path: Path, power: float) -> None:
    recipe = recipe_of(tiny, "esm", polarization=power, scaling=0.7, batch_size=4)
    found = merged(recipe, tmp_path / "merged")
    base = family_of(tiny.base).load(tiny.base)
    rows, vectors = [], []
    for task in TASKS:
        model = expert_of(recipe, task)
        names = [f"{BLOCK}.{i}.{name}" for i in (0, 1) for name in LAYERS]
        modules = {name: model.get_submodule(name) for name in names}
        pixels = pixels_of(recipe, task)
        rows.append(seen_by(lambda model=model, pixels=pixels: model(pixels), modules))  # type: ignore[misc]
        vectors.append(
            {
                name: (value - base.get_parameter(name)).detach()
                for name, value in model.named_parameters()
            }
        )
    for layer in LAYERS:
        pair = [f"{BLOCK}.{index}.{layer}" for index in (0, 1)]
        plain = [
            plain_esm([v[f"{name}.weight"] for v in vectors], [r[name] for r in rows], power)
            for name in pair
        ]
        mean = (plain[0].norm() + plain[1].norm()) / 2
        for name, value in zip(pair, plain, strict=True):
            change = found[f"{name}.weight"] - base.get_parameter(f"{name}.weight")
            expected = 0.7 * value * (value.norm() / mean) ** power
            assert torch.allclose(change, expected, atol=2e-3 * float(expected.abs().max())), name
            bias = torch.stack([v[f"{name}.bias"] for v in vectors]).mean(dim=0)
            change = found[f"{name}.bias"] - base.get_parameter(f"{name}.bias")
            assert torch.allclose(change, 0.7 * bias, atol=1e-6), name


def test_esm_is_linear_in_its_scaling_so_that_it_can_be_searched(
    tiny: TinyZoo, tmp_path: Path
) -> None:
    once = merged(recipe_of(tiny, "esm", scaling=0.5), tmp_path / "once")
    twice = merged(recipe_of(tiny, "esm", scaling=1.0), tmp_path / "twice")
    base = family_of(tiny.base).load(tiny.base)
    for name, value in once.items():
        start = base.get_parameter(name)
        assert torch.allclose(twice[name] - start, 2 * (value - start), atol=1e-5), name
    searched = recipe_of(tiny, "esm", search=True)
    manifest = merge(searched, tmp_path / "searched")
    assert manifest.reported["scaling"] in [s["scaling"] for s in manifest.reported["search"]]
    with pytest.raises(RecipeError, match=r"merge\.samples are searched on"):
        merge(override(searched, "merge", {"search_samples": 8}), tmp_path / "idle")


def plain_fisher(model: nn.Module, head: TaskHead, pixels: Tensor) -> dict[str, Tensor]:
    """Sample by sample, from the Jacobian of all log-probabilities."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def scores(values: dict[str, Tensor], image: Tensor) -> Tensor:
        features = functional_call(model, values, kwargs={"pixel_values": image}).image_embeds
        return head(features / features.norm(dim=-1, keepdim=True))[0].log_softmax(0)

    for image in pixels.split(1):
        chances = scores(parameters, image).exp()
        for name, jacobian in jacrev(scores)(parameters, image).items():
            total[name] += torch.einsum("c,c...->...", chances, jacobian**2) / len(pixels)
    return total


def test_fisher_equals_the_plain_reference(tiny: TinyZoo, tmp_path: Path) -> None:
    recipe = recipe_of(tiny, "fisher", labels=0, weights={"red": 1, "green": 2, "blue": 1})
    found = merged(recipe, tmp_path / "merged")
    experts = [expert_of(recipe, task) for task in TASKS]
    fishers = [
        plain_fisher(model, head_of(recipe, task), pixels_of(recipe, task))
        for task, model in zip(TASKS, experts, strict=True)
    ]
    norms = [torch.cat([v.flatten() for v in own.values()]).norm() for own in fishers]
    scales = [weight / norm for weight, norm in zip((1, 2, 1), norms, strict=True)]
    for name in found.keys() & fishers[0].keys():
        weights = [s * own[name].clamp(min=1e-6) for s, own in zip(scales, fishers, strict=True)]
        values = [model.get_parameter(name) for model in experts]
        top = torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(dim=0)
        expected = top / torch.stack(weights).sum(dim=0)
        assert torch.allclose(found[name], expected, atol=1e-4), name


def test_drawn_labels_give_the_expectation(tiny: TinyZoo, tmp_path: Path) -> None:
    norms = [
        merge(recipe_of(tiny, "fisher", labels=labels), tmp_path / str(labels)).reported[
            "fisher_norms"
        ]
        for labels in (0, 300)
    ]
    for task in TASKS:
        assert norms[1][task] == pytest.approx(norms[0][task], rel=0.1)


def test_equal_fishers_give_the_average() -> None:
    vectors, ones = torch.randn(3, 4, 5), torch.full((3, 1, 1), 1 / 3)
    equal = torch.rand(1, 4, 5).expand(3, -1, -1)
    assert torch.allclose(fisher_mean(vectors, equal, ones, 1e-6), vectors.mean(dim=0), atol=1e-6)
    assert torch.allclose(fisher_mean(vectors, 0 * equal, ones, 1e-6), vectors.mean(dim=0))
    certain = torch.zeros(3, 4, 5)
    certain[1] = 1e6
    assert torch.allclose(fisher_mean(vectors, certain, ones, 1e-6), vectors[1], atol=1e-4)


def test_adamerging_of_no_steps_is_task_arithmetic(tiny: TinyZoo, tmp_path: Path) -> None:
    flags = {"layers": ["*.mlp.*:initial=0.1"]}
    found = merged(recipe_of(tiny, "adamerging", steps=0, initial=0.4, **flags), tmp_path / "ada")
    same = override(
        load_recipe(tiny.recipe), "merge", {"scaling": 0.4, "layers": ["*.mlp.*:scaling=0.1"]}
    )
    for name, value in merged(same, tmp_path / "ta").items():
        assert torch.allclose(found[name], value, atol=1e-6), name


def test_adamerging_lowers_the_entropy_it_reports(tiny: TinyZoo, tmp_path: Path) -> None:
    recipe = recipe_of(tiny, "adamerging", steps=20, learning_rate=0.02)
    manifest = merge(recipe, tmp_path / "merged")
    family = family_of(tmp_path / "merged")
    model = family.load(tmp_path / "merged")
    total = 0.0
    for task in TASKS:
        with torch.no_grad():
            logits = head_of(recipe, task)(family.embed(model, pixels_of(recipe, task)))
        chances = logits.softmax(dim=1)
        assert torch.allclose(entropy(logits), -(chances * chances.log()).sum(dim=1), atol=1e-5)
        total += float(entropy(logits).mean())
    assert manifest.reported["entropy_after"] == pytest.approx(total / len(TASKS), rel=1e-4)
    assert manifest.reported["entropy_after"] < manifest.reported["entropy_before"]


def test_adamerging_steps_equal_plain_autograd(tiny: TinyZoo, tmp_path: Path) -> None:
    recipe = recipe_of(tiny, "adamerging", steps=3, learning_rate=0.3, batch_size=SAMPLES)
    found = merged(recipe, tmp_path / "merged")
    base = family_of(tiny.base).load(tiny.base)
    start = {name: base.get_parameter(name).detach() for name in found}
    vectors = {
        name: torch.stack(
            [expert_of(recipe, task).get_parameter(name).detach() - value for task in TASKS]
        )
        for name, value in start.items()
    }
    raw = torch.full((len(start), len(TASKS)), 0.3, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.3)

    def weights() -> dict[str, Tensor]:
        rows = raw.clamp(0, 1)
        return {
            name: value + (row.reshape(-1, *[1] * value.dim()) * vectors[name]).sum(dim=0)
            for (name, value), row in zip(start.items(), rows, strict=True)
        }

    for _ in range(3):
        loss = torch.zeros(())
        for task in TASKS:
            inputs = {"pixel_values": pixels_of(recipe, task)}
            features = functional_call(base, weights(), kwargs=inputs).image_embeds
            logits = head_of(recipe, task)(features / features.norm(dim=-1, keepdim=True))
            loss = loss + entropy(logits).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for name, value in weights().items():
        assert torch.allclose(found[name], value, atol=1e-4), name
    # Bounds have been met, or they would not be tested.
    assert bool((raw < 0).any()) and bool((raw > 1).any())


@pytest.mark.parametrize("method", [name for name in DATA_METHODS if name != "esm"])
def test_one_expert_is_itself(tiny: TinyZoo, tmp_path: Path, method: str) -> None:
    options = QUICK[method] | ({"initial": 1, "steps": 0} if method == "adamerging" else {})
    recipe = only(recipe_of(tiny, method, **options), "red")
    model = expert_of(recipe, "red")
    for name, value in merged(recipe, tmp_path / "merged").items():
        if name in dict(model.named_parameters()):
            assert torch.allclose(value, model.get_parameter(name), atol=1e-5), name


@pytest.mark.parametrize("method", ["regmean", "regmean_pp", "fisher"])
def test_identical_experts_are_themselves(tiny: TinyZoo, tmp_path: Path, method: str) -> None:
    recipe = recipe_of(tiny, method, **QUICK[method])
    red = recipe.tasks["red"].expert
    tasks = {name: task.model_copy(update={"expert": red}) for name, task in recipe.tasks.items()}
    same = recipe.model_copy(update={"tasks": tasks})
    model = expert_of(same, "blue")
    for name, value in merged(same, tmp_path / "merged").items():
        if name in dict(model.named_parameters()):
            assert torch.allclose(value, model.get_parameter(name), atol=1e-5), name


@pytest.mark.parametrize("method", DATA_METHODS)
def test_order_of_experts_does_not_matter(tiny: TinyZoo, tmp_path: Path, method: str) -> None:
    recipe = recipe_of(tiny, method, **QUICK[method])
    first = merged(recipe, tmp_path / "first")
    second = merged(only(recipe, *reversed(TASKS)), tmp_path / "second")
    for name, value in first.items():
        assert torch.allclose(second[name], value, atol=1e-4), name


@pytest.mark.parametrize("method", DATA_METHODS)
def test_missing_data_and_heads_are_named_at_once(
    tiny: TinyZoo, tmp_path: Path, method: str
) -> None:
    recipe = recipe_of(tiny, method)
    tasks = dict(recipe.tasks)
    tasks["red"] = tasks["red"].model_copy(update={"calibration": None})
    tasks["blue"] = tasks["blue"].model_copy(update={"head": None})
    with pytest.raises(MismatchError) as caught:
        merge(recipe.model_copy(update={"tasks": tasks}), tmp_path / "merged")
    what = f"which merge.method {method} needs"
    expected = [f"task 'red' has no calibration data, {what}"]
    if method in ("fisher", "adamerging"):
        expected.append(f"task 'blue' has no head, {what}")
    assert list(caught.value.problems) == expected
    assert not list(tmp_path.iterdir())


def test_inputs_that_decide_too_little_are_an_error() -> None:
    gram = torch.tensor([[1.0, 1.1], [1.1, 1.0]])
    with pytest.raises(NumericsError, match=r"lower merge\.off_diagonal or raise merge\.samples"):
        regression_mean(torch.zeros(3, 2), torch.ones(3, 2), gram)


def test_activations_on_disk_give_the_same(tiny: TinyZoo, tmp_path: Path) -> None:
    in_memory = merged(recipe_of(tiny, "regmean_pp"), tmp_path / "memory")
    on_disk = merged(recipe_of(tiny, "regmean_pp", cache_limit=0.0), tmp_path / "disk")
    assert all(torch.equal(value, on_disk[name]) for name, value in in_memory.items())


def test_batches_of_texts_do_not_matter_so_padding_does_not_count(
    tiny_text: TinyText, tmp_path: Path
) -> None:
    for method, options in (
        ("regmean", {"off_diagonal": 0.9}),
        ("regmean_pp", {"off_diagonal": 0.9}),
        ("esm", {}),
    ):
        found = []
        for size in (1, 24):
            flags = {"method": method, "batch_size": size, **options}
            folder = tmp_path / f"{method}{size}"
            merge(override(load_recipe(tiny_text.recipe), "merge", flags), folder)
            found.append(load_file(folder / "model.safetensors"))
        for name, value in found[0].items():
            assert torch.allclose(found[1][name], value, atol=1e-4), name


@pytest.mark.parametrize("method", ["fisher", "adamerging"])
def test_classifiers_bring_their_own_heads(
    tiny_text: TinyText, tmp_path: Path, method: str
) -> None:
    flags = {"method": method, "samples": 4, **QUICK[method]}
    manifest = merge(override(load_recipe(tiny_text.recipe), "merge", flags), tmp_path / "merged")
    assert manifest.reported["method"] == method
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in found.values())
