"""The quantize stage: a merged folder in, the quantized artifact out."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.calibration.target import CalibratedOptions
from epmq_deploy.calibration.targets import TARGETS
from epmq_deploy.checkpoints import weight_files
from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.merging.merge import open_experts
from epmq_deploy.models import ModelFamily, family_of
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.quantization.artifact import save_artifact
from epmq_deploy.quantization.model import QuantizedModel, quantize_model
from epmq_deploy.recipe import Recipe
from epmq_deploy.stage import (
    Manifest,
    atomic_folder,
    check_outputs,
    files_sha256,
    fingerprint,
    read_manifest,
    refuse_existing,
    write_manifest,
)
from epmq_deploy.tasks.data import Samples, batches, data_sha256, load_samples
from epmq_deploy.tasks.experts import ExpertBackbone

# The merged model travels inside the artifact, so that export needs this one folder.
MERGED_FOLDER = "merged"


def quantize_fingerprint(recipe: Recipe, merged: Manifest) -> tuple[str, dict[str, str]]:
    """What decides the codes: fingerprint and input hashes by role."""
    inputs = {"merge": merged.fingerprint}
    if TARGETS[recipe.quantize.method].uses_data:
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
    progress = progress or NoProgress()
    refuse_existing(output, overwrite)
    made = read_manifest(merged, "merge")
    check_outputs(merged, made)
    mark, inputs = quantize_fingerprint(recipe, made)
    family = family_of(merged)
    samples = calibration_samples(recipe)
    device = device or torch.device("cpu")
    experts = _experts(recipe, made, device)
    model = family.load(merged).to(device)
    quantized = quantize_model(
        model,
        family,
        TARGETS[recipe.quantize.method],
        recipe.quantize,
        batches=_batches(samples, family, merged, recipe, progress),
        experts=experts,
        progress=progress,
    )
    with atomic_folder(output, overwrite=overwrite) as folder:
        shutil.copytree(merged, folder / MERGED_FOLDER, copy_function=_link_or_copy)
        save_artifact(folder, quantized)
        return write_manifest(
            folder, Manifest("quantize", mark, recipe, inputs, details=_summary(quantized))
        )


def calibration_samples(recipe: Recipe) -> dict[str, Samples]:
    """The calibration samples of every task, loaded and chosen; empty where none are needed.

    Raises:
        MismatchError: names every task whose data is missing or cannot be loaded.
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
            samples[name] = load_samples(
                name, task.calibration, limit=options.samples, seed=options.seed
            )
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise MismatchError("calibration data", problems)
    return samples


def _batches(
    samples: dict[str, Samples],
    family: ModelFamily,
    folder: Path,
    recipe: Recipe,
    progress: Progress,
) -> dict[str, Callable[[], Iterator[tuple[Tensor, ...]]]]:
    if not isinstance(recipe.quantize, CalibratedOptions):
        return {}
    size = recipe.quantize.batch_size
    return {
        name: partial(batches, chosen, family, folder, size) for name, chosen in samples.items()
    }


def _experts(recipe: Recipe, merged: Manifest, device: torch.device) -> ExpertBackbone | None:
    """The experts, for guided targets, if they are still those that were merged."""
    if not TARGETS[recipe.quantize.method].uses_experts:
        return None
    problems = []
    for name, expert in open_experts(recipe).experts.items():
        then = merged.inputs.get(f"expert:{name}")
        if then is None:
            problems.append(f"expert {name!r} is not part of the merged model")
        elif then != files_sha256(weight_files(expert.folder)):
            problems.append(f"expert {name!r} in {expert.folder} was changed since it was merged")
    if problems:
        raise MismatchError("the experts are not those that were merged", problems)
    return ExpertBackbone(recipe, device)


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
