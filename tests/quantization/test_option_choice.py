"""Efforts: what is chosen on held-back calibration samples, and what follows from it."""

import logging
from collections.abc import Mapping
from pathlib import Path

import onnxruntime
import pytest
import torch
from interrupted import killed_in
from tiny_zoo import TASKS, TinyZoo

from epmq_deploy.data.agreement import Scores
from epmq_deploy.data.heads import load_heads
from epmq_deploy.errors import RecipeError
from epmq_deploy.exporters.stage import export
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import TaskHead
from epmq_deploy.quantization.artifact import CODES_FILE, load_refitted_heads
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.methods.epmq import EpmqOptions
from epmq_deploy.quantization.option_choice import pick
from epmq_deploy.quantization.stage import quantize, quantize_fingerprint
from epmq_deploy.recipe import Recipe, load_recipe, override


@pytest.fixture(scope="module")
def merged(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge") / "merged"
    merge(load_recipe(tiny.recipe), folder)
    return folder


def asking(tiny: TinyZoo, **options: object) -> Recipe:
    """Return the recipe with these options of quantization, and no effort unless they name one."""
    recipe = load_recipe(tiny.recipe)
    given = recipe.quantize.model_dump(exclude_unset=True, exclude={"effort"})
    return override(
        recipe.model_copy(update={"quantize": EpmqOptions(**given)}), "quantize", options
    )


def without_heads(recipe: Recipe) -> Recipe:
    tasks = {name: task.model_copy(update={"head": None}) for name, task in recipe.tasks.items()}
    return recipe.model_copy(update={"tasks": tasks})


def losses(mean: float, spread: float = 0.0) -> Scores:
    """Return losses of two tasks whose paired difference from others may spread."""
    noise = spread * torch.tensor([1.0, -1.0]).repeat(8)
    return {"a": torch.full((16,), mean) + noise, "b": torch.full((16,), mean) - noise}


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([losses(0.9)], (1, None)),
        ([losses(1.1)], (0, None)),
        # Better, but by less than a standard error.
        ([losses(0.99, spread=0.5)], (0, None)),
        ([losses(0.9), losses(0.8)], (2, None)),
    ],
)
def test_another_candidate_has_to_be_clearly_better(
    others: list[Scores], expected: tuple[int, None]
) -> None:
    number, pull, _ = pick([{None: losses(1.0)}, *({None: scores} for scores in others)])
    assert (number, pull) == expected


@pytest.mark.parametrize(
    ("by_pull", "expected"),
    [
        ({None: losses(1.0), 1.0: losses(0.9), 0.1: losses(0.8)}, 0.1),
        ({None: losses(1.0), 1.0: losses(0.8), 0.1: losses(0.9)}, 1.0),
        ({None: losses(1.0), 1.0: losses(0.801, 0.1), 0.1: losses(0.8)}, 1.0),
        ({None: losses(0.8), 1.0: losses(0.8), 0.1: losses(0.9)}, None),
    ],
)
def test_the_strongest_pull_that_is_as_good_as_the_best_is_taken(
    by_pull: Mapping[float | None, Scores], expected: float | None
) -> None:
    assert pick([by_pull])[1] == expected


def test_the_default_chooses_and_records_it(tiny: TinyZoo, merged: Path, tmp_path: Path) -> None:
    manifest = quantize(asking(tiny), merged, tmp_path / "out")
    choice = manifest.details.options
    assert choice is not None and not choice.reason
    assert choice.judged_by == dict.fromkeys(TASKS, "labels")
    assert (choice.judged, choice.fitted) == (12, 12)
    assert choice.chosen in [each.settings for each in choice.tried]
    candidates = QUANTIZATION_METHODS["epmq"].candidates(asking(tiny).quantize)
    settings = [each.settings for each in candidates]
    tried = [each.settings for each in choice.tried]
    # A stronger anchor, then what lies on the side that helped.
    assert tried[:2] == settings[:2]
    best = [min(loss for _, loss in each.losses) for each in choice.tried]
    assert tried[2:] == settings[2:3] if best[1] < best[0] else settings[3:]
    refitted = load_refitted_heads(tmp_path / "out")
    assert tuple(refitted) == manifest.details.refitted_heads
    assert bool(refitted) == (choice.head_pull is not None)


def test_without_labels_experts_are_the_judge(
    tiny: TinyZoo, merged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = asking(tiny)
    source = recipe.tasks[TASKS[0]].calibration
    assert source is not None
    wrong = source.model_copy(update={"label_names": ("one", "two", "three", "four", "five")})
    tasks = dict(recipe.tasks)
    tasks[TASKS[0]] = tasks[TASKS[0]].model_copy(update={"calibration": wrong})
    with caplog.at_level(logging.WARNING):
        manifest = quantize(recipe.model_copy(update={"tasks": tasks}), merged, tmp_path / "out")
    assert manifest.details.options is not None
    assert manifest.details.options.judged_by == {
        TASKS[0]: "expert",
        **dict.fromkeys(TASKS[1:], "labels"),
    }
    assert f"labels of calibration data are not used: task {TASKS[0]!r}" in caplog.text


def test_a_preset_is_taken_as_it_is(tiny: TinyZoo, merged: Path, tmp_path: Path) -> None:
    quantize(asking(tiny, preset="features"), merged, tmp_path / "preset")
    fast = quantize(asking(tiny, preset="features", effort="fast"), merged, tmp_path / "fast")
    assert fast.details.options is None
    codes = [(tmp_path / name / CODES_FILE).read_bytes() for name in ("preset", "fast")]
    assert codes[0] == codes[1]


def test_options_that_are_given_stay(tiny: TinyZoo) -> None:
    method = QUANTIZATION_METHODS["epmq"]
    candidates = method.candidates(asking(tiny, anchor=0.3, rho=1.0).quantize)
    assert {each.options.values.anchor for each in candidates} == {0.3}
    assert {each.options.values.rho for each in candidates} == {1.0}
    assert len({each.options.values for each in candidates}) == len(candidates) > 1
    (only,) = {
        each.options.preset
        for each in method.candidates(asking(tiny, preset="paper", effort="balanced").quantize)
    }
    assert only == "paper"


def test_without_heads_the_default_says_that_it_chooses_nothing(
    tiny: TinyZoo, merged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantize(asking(tiny, effort="fast"), merged, tmp_path / "fast")
    with caplog.at_level(logging.WARNING):
        manifest = quantize(without_heads(asking(tiny)), merged, tmp_path / "out")
    assert manifest.details.options is not None
    assert manifest.details.options.reason == "no task has a head"
    assert "nothing was chosen on held-back calibration samples: no task has a head" in caplog.text
    codes = [(tmp_path / name / CODES_FILE).read_bytes() for name in ("out", "fast")]
    assert codes[0] == codes[1]


@pytest.mark.parametrize("options", [{"effort": "balanced"}, {"heads": "refit"}])
def test_what_is_asked_for_needs_heads(
    tiny: TinyZoo, merged: Path, tmp_path: Path, options: dict[str, str]
) -> None:
    asked = "|".join(f"quantize.{name}: {value}" for name, value in options.items())
    with pytest.raises(RecipeError, match=rf"({asked}) needs a head for every task"):
        quantize(without_heads(asking(tiny, **options)), merged, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_effort_chooses_the_anchor_itself(tiny: TinyZoo) -> None:
    with pytest.raises(RecipeError, match="chooses the anchor: leave out anchor: auto"):
        asking(tiny, effort="balanced", anchor="auto")


def test_heads_decide_the_fingerprint(tiny: TinyZoo) -> None:
    recipe = asking(tiny)
    assert quantize_fingerprint(recipe, "m") != quantize_fingerprint(without_heads(recipe), "m")


def test_an_interrupted_run_chooses_once(
    tiny: TinyZoo, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = asking(tiny)
    choice = quantize(recipe, merged, tmp_path / "whole").details.options
    assert choice is not None
    count = len(choice.tried)
    # Candidates run through both blocks.
    killed_in(2 * count + 1, recipe, merged, tmp_path / "out", monkeypatch)
    monkeypatch.setattr(
        "epmq_deploy.quantization.stage.choose_options", lambda *_, **__: pytest.fail("again")
    )
    quantize(recipe, merged, tmp_path / "out")
    codes = [(tmp_path / name / CODES_FILE).read_bytes() for name in ("whole", "out")]
    assert codes[0] == codes[1]


def test_low_bit_graphs_have_the_refitted_heads_and_fp32_those_that_were(
    tiny: TinyZoo, merged: Path, tmp_path: Path
) -> None:
    recipe = asking(tiny, effort="fast", heads="refit")
    quantize(recipe, merged, tmp_path / "quantized")
    manifest = export(recipe, tmp_path / "quantized", tmp_path / "exported")
    original, refitted = (
        load_heads(tmp_path / "exported"),
        load_refitted_heads(tmp_path / "quantized"),
    )
    assert refitted.keys() == original.keys()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).numpy()
    for entry in manifest.details.graphs:
        session = onnxruntime.InferenceSession(
            tmp_path / "exported" / entry.file, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(None, {"pixel_values": pixels}), strict=True))
        heads = refitted if entry.low_bit else original
        for task in TASKS:
            embedding = torch.from_numpy(outputs["embedding"])
            expected = heads[task](embedding).numpy()
            assert outputs[f"logits_{task}"] == pytest.approx(expected, abs=1e-4)
            other: TaskHead = (original if entry.low_bit else refitted)[task]
            assert outputs[f"logits_{task}"] != pytest.approx(other(embedding).numpy(), abs=1e-3)
