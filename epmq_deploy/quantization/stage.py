"""The quantize stage: a merged folder in, the quantized artifact out."""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch

from epmq_deploy.artifacts.folders import atomic_folder, refuse_existing
from epmq_deploy.artifacts.manifest import QuantizeDetails, QuantizeManifest, fingerprint
from epmq_deploy.artifacts.outputs import finish_output, open_output
from epmq_deploy.data.heads import build_heads, heads_of_experts, heads_sha256
from epmq_deploy.data.pseudo_labels import (
    answer_details,
    with_answers,
    without_answers,
    write_answers,
)
from epmq_deploy.data.samples import Samples, data_sha256, load_calibration
from epmq_deploy.errors import EpmqError, MismatchError, RecipeError
from epmq_deploy.models import ModelFamily, TaskHead, family_of
from epmq_deploy.models.experts import ExpertBackbone, check_unchanged, open_sources
from epmq_deploy.options import without_effect
from epmq_deploy.options.quantization import CalibratedOptions, QuantizeOptions
from epmq_deploy.progress import Progress
from epmq_deploy.quantization.artifact import save_artifact
from epmq_deploy.quantization.context import CalibrationContext
from epmq_deploy.quantization.distillation import distill
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.methods.epmq import EpmqOptions
from epmq_deploy.quantization.planning import plan_anchor, plan_bits, with_bits
from epmq_deploy.quantization.results import QuantizedModel
from epmq_deploy.quantization.resume import FinishedWork
from epmq_deploy.recipe import Recipe

log = logging.getLogger(__name__)

# The merged model travels inside the artifact, so that export needs this one folder.
MERGED_FOLDER = "merged"


def uses_data(options: QuantizeOptions) -> TypeGuard[CalibratedOptions]:
    """Whether calibration samples are needed."""
    calibrated = isinstance(options, CalibratedOptions)
    return calibrated and not QUANTIZATION_METHODS[options.method].is_data_free(options)


def _asks_for_heads(options: QuantizeOptions) -> list[str]:
    """The options given that need the tasks' heads."""
    if not isinstance(options, EpmqOptions):
        return []
    asked = {"anchor: auto": options.anchor == "auto", "distill": options.distill > 0}
    return [f"quantize.{option}" for option, given in asked.items() if given]


def check_options(recipe: Recipe) -> None:
    """Make sure that every option given to quantization has an effect.

    Raises:
        RecipeError: one sentence for each that has none.
    """
    if problems := without_effect("quantize", recipe.quantize.idle()):
        raise RecipeError("; ".join(problems))


def missing_heads(
    options: QuantizeOptions, family: ModelFamily, tasks: Collection[str], heads: Collection[str]
) -> str:
    """One sentence when the options need heads that are not there, else nothing.

    Args:
        options: of the method.
        family: the model's; those that write texts predict without heads.
        tasks: names of all tasks.
        heads: names of those with a head.
    """
    asked = _asks_for_heads(options)
    missing = [task for task in tasks if task not in heads]
    if not asked or not missing or family.generates_text:
        return ""
    return (
        f"{', '.join(asked)} needs a head for every task (tasks.*.head); "
        f"without: {', '.join(missing)}"
    )


def quantize_fingerprint(recipe: Recipe, merged: str) -> tuple[str, dict[str, str]]:
    """What decides the codes, after a merge of fingerprint ``merged``; also input hashes."""
    inputs = {"merge": merged}
    if uses_data(recipe.quantize):
        for name, task in recipe.tasks.items():
            if task.calibration is not None:
                inputs[f"calibration:{name}"] = data_sha256(task.calibration, task.prompt)
    if _asks_for_heads(recipe.quantize):
        inputs |= heads_sha256(recipe.tasks)
    return fingerprint("quantize", recipe.quantize.deciding, inputs), inputs


def quantize(
    recipe: Recipe,
    merged: Path,
    output: Path,
    *,
    overwrite: bool = False,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> QuantizeManifest:
    """Quantize the merged model in ``merged`` as the recipe says.

    Finished blocks are kept beside ``output`` until it is written: when interrupted, the same call
    goes on after the last of them and yields the same codes.

    Raises:
        RecipeError: the output exists, an input folder is not a merged model, or options have no
            effect.
        MismatchError: calibration data or experts are missing or do not fit; all at once.
        NumericsError: a layer could not be solved as asked.
    """
    check_options(recipe)
    refuse_existing(output, "quantize", overwrite=overwrite, source=merged)
    made = open_output(merged, "merge")
    mark, inputs = quantize_fingerprint(recipe, made.fingerprint)
    family = family_of(merged)
    samples = calibration_samples(recipe, family, merged)
    device = device or torch.device("cpu")
    experts = None
    if QUANTIZATION_METHODS[recipe.quantize.method].uses_experts or without_answers(samples):
        sources = open_sources(recipe)
        check_unchanged(sources, made)
        experts = ExpertBackbone(sources, device)
    finished = FinishedWork(output, f"{mark} {_arithmetic(recipe.quantize, device)}")
    place = CalibrationContext(family, merged, samples, experts, device, progress, finished.scratch)
    if finished.blocks:
        log.info("going on after %d finished blocks of an interrupted run", finished.blocks)
    try:
        quantized, plans = _quantized(recipe, place, finished)
    except EpmqError:
        # The same command would fail again, and another one could not use what there is.
        finished.remove()
        raise
    except KeyboardInterrupt:
        log.warning(
            "interrupted with %d blocks finished; the same command goes on from there",
            finished.blocks,
        )
        raise
    with atomic_folder(output) as folder:
        shutil.copytree(merged, folder / MERGED_FOLDER, copy_function=_link_or_copy)
        save_artifact(folder, quantized)
        details = {"merge": made.details} | _summary(quantized) | plans
        manifest = QuantizeManifest(
            fingerprint=mark,
            recipe=recipe,
            inputs=inputs | made.models,
            details=QuantizeDetails.model_validate(details),
        )
        manifest = finish_output(folder, manifest)
    finished.remove()
    return manifest


def _arithmetic(options: QuantizeOptions, device: torch.device) -> str:
    """What codes depend on beside options and inputs: blocks of different kinds do not mix."""
    products = QUANTIZATION_METHODS[options.method].products_dtype(options)
    return f"{device.type} {products} {torch.get_num_threads()} threads"


def _quantized(
    recipe: Recipe, place: CalibrationContext, finished: FinishedWork
) -> tuple[QuantizedModel, dict[str, Any]]:
    """The quantized model, and how what depends on the model was settled."""
    place, answers = _answered(place, finished)
    heads = _heads(recipe, place)
    if heads:
        own = heads_of_experts(recipe, heads, place.device)
        place = replace(place, expert_heads=own)
    options, plans = _planned(recipe.quantize, place, heads, finished)
    model, quantized = place.calibrate(options, finished=finished)
    if isinstance(options, EpmqOptions) and options.distill:
        products = QUANTIZATION_METHODS[options.method].products_dtype(options)
        quantized, plans["distill"] = distill(
            model, quantized, place, heads, epochs=options.distill, products=products
        )
    return quantized, plans | answers


def _answered(
    place: CalibrationContext, finished: FinishedWork
) -> tuple[CalibrationContext, dict[str, Any]]:
    """The place with experts' answers where data have none, and what the manifest says of them."""
    if not without_answers(place.samples):
        return place, {}
    assert place.experts is not None, "opened where answers are to be written"
    experts, shown = place.experts, place.progress
    write = partial(write_answers, place.samples, place.family, place.folder, experts.become, shown)
    written = finished.once("answers", write)
    samples = with_answers(place.samples, written)
    return replace(place, samples=samples), answer_details(written)


def _heads(recipe: Recipe, place: CalibrationContext) -> dict[str, TaskHead]:
    """Heads of all tasks where the options ask for predictions; none where the model writes texts.

    Raises:
        RecipeError: a task has none.
    """
    if not _asks_for_heads(recipe.quantize) or place.family.generates_text:
        return {}
    features = place.family.embedding_width(place.family.load(place.folder), place.folder)
    heads = build_heads(recipe.tasks, place.family, place.folder, features, device=place.device)
    if problem := missing_heads(recipe.quantize, place.family, recipe.tasks, heads):
        raise RecipeError(problem)
    return heads


def _planned(
    options: QuantizeOptions,
    place: CalibrationContext,
    heads: Mapping[str, TaskHead],
    finished: FinishedWork,
) -> tuple[QuantizeOptions, dict[str, Any]]:
    """The options with everything settled that depends on the model, and how it was settled."""
    plans: dict[str, Any] = {}
    if isinstance(options, EpmqOptions) and options.anchor == "auto":
        found = finished.once("anchor", partial(plan_anchor, options, place, heads))
        log.info("anchor auto: %g", found["anchor"])
        options, plans["anchor"] = options.model_copy(update={"anchor": found["anchor"]}), found
    if options.target_bits is not None or options.target_size is not None:
        found = finished.once("bits", partial(plan_bits, options, place))
        log.info("bits per layer: %.3f on average", found["mean_bits"])
        options, plans["bits"] = with_bits(options, found["layers"]), found
    return options, plans


def calibration_samples(recipe: Recipe, family: ModelFamily, folder: Path) -> dict[str, Samples]:
    """The calibration samples of every task, loaded and chosen; empty where none are needed.

    Those of tasks in words may lack answers, which experts have to write; see ``own_answers``.

    Args:
        recipe: tasks and options.
        family: the model's family.
        folder: a model folder with preprocessor settings.

    Raises:
        MismatchError: names every task whose data is missing or cannot be used.
    """
    options = recipe.quantize
    if not uses_data(options):
        return {}
    samples, problems = load_calibration(
        recipe.tasks,
        family,
        folder,
        limit=options.samples,
        seed=options.seed,
        option="quantize.samples",
        without=": add tasks.{task}.calibration to the recipe, or use "
        "quantize.preset: weights, which needs none",
    )
    if problems:
        raise MismatchError("calibration data", problems)
    return samples


def _link_or_copy(source: str, target: str) -> Any:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _summary(quantized: QuantizedModel) -> dict[str, Any]:
    done = [report for report in quantized.reports if report.bits]

    def mean_of(values: Iterable[float]) -> float:
        return sum(values) / max(len(done), 1)

    return {
        "layers": len(done),
        "kept": [report.layer for report in quantized.reports if report.status == "kept"],
        "status": dict(Counter(report.status for report in quantized.reports)),
        "input_statistics": len(quantized.inputs),
        "mean_error_before": mean_of(report.error_before for report in done),
        "mean_error_after": mean_of(report.error_after for report in done),
    }
