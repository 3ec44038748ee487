"""The quantize stage: a merged folder in, the quantized artifact out."""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from epmq_deploy.calibration.target import CalibratedOptions
from epmq_deploy.calibration.targets import TARGETS
from epmq_deploy.errors import EpmqError, MismatchError
from epmq_deploy.experts import ExpertBackbone, check_unchanged, open_sources
from epmq_deploy.models import ModelFamily, family_of
from epmq_deploy.progress import Progress
from epmq_deploy.quantization.artifact import save_artifact
from epmq_deploy.quantization.model import QuantizedModel, quantize_model
from epmq_deploy.recipe import Recipe
from epmq_deploy.stage import (
    Manifest,
    atomic_folder,
    fingerprint,
    model_inputs,
    open_output,
    refuse_existing,
    write_manifest,
)
from epmq_deploy.tasks.data import Samples, batches, data_sha256, load_samples

log = logging.getLogger(__name__)

# The merged model travels inside the artifact, so that export needs this one folder.
MERGED_FOLDER = "merged"


def quantize_fingerprint(recipe: Recipe, merged: str) -> tuple[str, dict[str, str]]:
    """What decides the codes, after a merge of fingerprint ``merged``; also input hashes."""
    inputs = {"merge": merged}
    if isinstance(recipe.quantize, CalibratedOptions):
        for name, task in recipe.tasks.items():
            if task.calibration is not None:
                inputs[f"calibration:{name}"] = data_sha256(task.calibration)
    return fingerprint("quantize", recipe.quantize.model_dump(mode="json"), inputs), inputs


def quantize(
    recipe: Recipe,
    merged: Path,
    output: Path,
    *,
    overwrite: bool = False,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Quantize the merged model in ``merged`` as the recipe says.

    Raises:
        RecipeError: the output exists, or an input folder is not a merged model.
        MismatchError: calibration data or experts are missing or do not fit; all at once.
        NumericsError: a layer could not be solved as asked.
    """
    refuse_existing(output, "quantize", overwrite=overwrite, source=merged)
    made = open_output(merged, "merge")
    mark, inputs = quantize_fingerprint(recipe, made.fingerprint)
    family = family_of(merged)
    samples = calibration_samples(recipe, family, merged)
    device = device or torch.device("cpu")
    target = TARGETS[recipe.quantize.method]
    experts = None
    if target.uses_experts:
        sources = open_sources(recipe)
        check_unchanged(sources, made)
        experts = ExpertBackbone(sources, device)
    size = getattr(recipe.quantize, "batch_size", 1)
    quantized = quantize_model(
        family.load(merged).to(device),
        family,
        target,
        recipe.quantize,
        batches={
            name: partial(batches, chosen, family, merged, size) for name, chosen in samples.items()
        },
        experts=experts,
        progress=progress,
    )
    with atomic_folder(output) as folder:
        shutil.copytree(merged, folder / MERGED_FOLDER, copy_function=_link_or_copy)
        save_artifact(folder, quantized)
        inputs |= model_inputs(made)
        return write_manifest(
            folder, Manifest("quantize", mark, recipe, inputs, details=_summary(quantized))
        )


def calibration_samples(recipe: Recipe, family: ModelFamily, folder: Path) -> dict[str, Samples]:
    """The calibration samples of every task, loaded and chosen; empty where none are needed.

    One sample of each task is decoded to make sure that the rest can be.

    Args:
        recipe: tasks and options.
        family: the model's family.
        folder: a model folder with preprocessor settings.

    Raises:
        MismatchError: names every task whose data is missing or cannot be used.
    """
    options = recipe.quantize
    if not isinstance(options, CalibratedOptions):
        return {}
    samples, problems = {}, []
    for name, task in recipe.tasks.items():
        if task.calibration is None:
            problems.append(
                f"task {name!r} has no calibration data: add tasks.{name}.calibration to the "
                "recipe and pass it with --recipe, or use --method rtn"
            )
            continue
        try:
            chosen = load_samples(
                name, task.calibration, family, limit=options.samples, seed=options.seed
            )
            next(batches(chosen, family, folder, 1))
        except EpmqError as error:
            problems.append(str(error))
            continue
        if len(chosen) < options.samples:
            log.warning(
                "task %r: %d calibration samples, %d were asked for (quantize.samples)",
                name,
                len(chosen),
                options.samples,
            )
        samples[name] = chosen
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
        "mean_error_before": mean_of(report.error_before for report in done),
        "mean_error_after": mean_of(report.error_after for report in done),
    }
