"""The quantize stage: a merged folder in, the quantized artifact out."""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType

import torch

from epmq_deploy.artifacts.folders import atomic_folder, reserved
from epmq_deploy.artifacts.manifest import (
    AnchorPlan,
    BitPlan,
    MergeManifest,
    OptionChoice,
    QuantizeDetails,
    QuantizeManifest,
    Residuals,
    fingerprint,
)
from epmq_deploy.artifacts.outputs import finish_output, open_output
from epmq_deploy.artifacts.space import require_space
from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.data.heads import build_heads, head_classes, heads_of_experts, heads_sha256
from epmq_deploy.data.loading import data_sha256, load_calibration
from epmq_deploy.data.pseudo_labels import (
    generate_pseudo_labels,
    unlabelled_tasks,
    with_pseudo_labels,
)
from epmq_deploy.data.samples import Samples
from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.models import ModelFamily, family_of
from epmq_deploy.models.experts import ExpertBackbone, check_unchanged, open_sources
from epmq_deploy.models.input_sources import written_inputs
from epmq_deploy.models.sizes import WeightCounts, weight_counts
from epmq_deploy.models.text_generation.base import generates_text
from epmq_deploy.options import without_effect
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.progress import Progress
from epmq_deploy.quantization.artifact import save_artifact
from epmq_deploy.quantization.context import CalibrationContext
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.option_choice import choose_options, refitted_heads
from epmq_deploy.quantization.phases import Distillations, quantize_in_phases
from epmq_deploy.quantization.planning import plan_anchor, plan_bits, with_bits
from epmq_deploy.quantization.results import QuantizedModel
from epmq_deploy.quantization.resume import FinishedWork
from epmq_deploy.recipe import Recipe

log = logging.getLogger(__name__)

# The merged model travels inside the artifact, so that export needs this one folder.
MERGED_FOLDER = "merged"


class _Decisions(Distillations, total=False):
    """What was decided by looking at models and data; fields of ``QuantizeDetails``."""

    options: OptionChoice
    anchor: AnchorPlan
    bits: BitPlan
    answers_by_experts: Mapping[str, int]
    refitted_heads: tuple[str, ...]
    residuals: Residuals


def check_options(recipe: Recipe) -> None:
    """Make sure that every option given to quantization has an effect.

    Raises:
        RecipeError: one sentence for each that has none.
    """
    if problems := without_effect("quantize", recipe.quantize.idle()):
        raise RecipeError("; ".join(problems))


def check_residuals(options: QuantizeOptions, family: ModelFamily) -> None:
    """Make sure that models of a family can have corrections for every task, where asked for.

    Raises:
        RecipeError: they cannot.
    """
    if generates_text(family) and QUANTIZATION_METHODS[options.method].residual_rank(options):
        raise RecipeError(
            "quantize.residual_rank is for classifiers and embeddings, and this model generates "
            "text; leave it out",
            options={"quantize.residual_rank": None},
        )


def missing_heads(
    options: QuantizeOptions, family: ModelFamily, tasks: Collection[str], heads: Collection[str]
) -> str:
    """Return one sentence when the options need heads that are not there, else nothing.

    Args:
        options: of the method.
        family: the model's; text-generation models predict without heads.
        tasks: names of all tasks.
        heads: names of those with a head.
    """
    asked = _needing_heads(options)
    missing = [task for task in tasks if task not in heads]
    if not asked or not missing or generates_text(family):
        return ""
    return (
        f"{', '.join(asked)} needs a head for every task (tasks.*.head); "
        f"missing for {', '.join(missing)}"
    )


def _needing_heads(options: QuantizeOptions) -> list[str]:
    """Return the options given that need the tasks' heads."""
    method = QUANTIZATION_METHODS[options.method]
    return [f"quantize.{option}" for option in method.needs_heads(options)]


def quantize_fingerprint(recipe: Recipe, merged: str) -> tuple[str, dict[str, str]]:
    """Return what decides the codes after a merge of fingerprint ``merged``, and input hashes."""
    inputs = {"merge": merged}
    if QUANTIZATION_METHODS[recipe.quantize.method].samples(recipe.quantize):
        for name, task in recipe.tasks.items():
            if task.calibration is not None:
                inputs[f"calibration:{name}"] = data_sha256(task.calibration, task.prompt)
    if QUANTIZATION_METHODS[recipe.quantize.method].compares_predictions(recipe.quantize):
        inputs |= heads_sha256(recipe.tasks)
    return fingerprint("quantize", recipe.quantize.deciding, inputs), inputs


def calibration_samples(
    recipe: Recipe,
    family: ModelFamily,
    folder: Path,
    inputs: Mapping[str, Path] = MappingProxyType({}),
) -> dict[str, Samples]:
    """Load the calibration samples of every task; none where the method uses none.

    Those of text-generation tasks may lack answers, which experts have to write; see
    ``epmq_deploy.data.pseudo_labels``.

    Args:
        recipe: tasks and options.
        family: the model's family.
        folder: a model folder with preprocessor settings.
        inputs: by task, the folder whose settings make its inputs where it is not ``folder``.

    Raises:
        MismatchError: names every task whose data is missing or cannot be used.
    """
    choice = QUANTIZATION_METHODS[recipe.quantize.method].samples(recipe.quantize)
    if choice is None:
        return {}
    samples, problems = load_calibration(
        recipe.tasks,
        family,
        folder,
        limit=choice.limit,
        seed=choice.seed,
        option="quantize.samples",
        without=": add tasks.{task}.calibration to the recipe, or use "
        "quantize.preset: weights, which needs none",
        preflight=recipe.preflight,
        inputs=inputs,
    )
    if problems:
        raise MismatchError("calibration data", problems)
    return samples


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

    Finished blocks are kept next to ``output`` until it is written: after an interruption the same
    call goes on after the last of them and yields the same codes.

    Raises:
        RecipeError: the output exists or another run is using it, an input folder is not a merged
            model, or options have no effect.
        MismatchError: calibration data or experts are missing or do not fit; all at once.
        DiskSpaceError: the disk has too little room; what is finished is kept.
        NumericsError: a layer could not be solved as asked.
    """
    check_options(recipe)
    with reserved(output, "quantize", overwrite=overwrite, source=merged):
        merge_manifest = open_output(merged, "merge")
        require_space(output, _needed_space(recipe, merged, output), "the quantized model")
        identity, inputs = quantize_fingerprint(recipe, merge_manifest.fingerprint)
        ctx = _open_context(recipe, merged, merge_manifest, device or torch.device("cpu"), progress)
        finished = FinishedWork(output, f"{identity} {_arithmetic(recipe.quantize, ctx.device)}")
        with finished.kept_when_interrupted():
            ctx = replace(ctx, scratch=finished.scratch)
            quantized, decisions = _quantize_model(recipe, ctx, finished)
        manifest = QuantizeManifest(
            fingerprint=identity,
            recipe=recipe,
            inputs=inputs | merge_manifest.models,
            details=_details(merge_manifest, quantized, decisions),
        )
        manifest = _write(output, merged, quantized, manifest)
        finished.remove()
        return manifest


def codes_size(counts: WeightCounts) -> int:
    """Return how many bytes the codes of all blocks take: one each."""
    return counts.in_blocks


def _needed_space(recipe: Recipe, merged: Path, output: Path) -> int:
    """Return how many bytes quantizing takes at least: codes twice, until all blocks are done."""
    folder = ModelFolder.at(merged)
    family = family_of(merged).merging(recipe.base.part)
    checkpoint = Checkpoint.open(folder, family.canonical_key, family.tied)
    needed = 2 * codes_size(weight_counts(checkpoint, family))
    parent = next(each for each in output.resolve().parents if each.exists())
    if parent.stat().st_dev != merged.stat().st_dev:
        # There the merged model cannot be linked.
        needed += sum(file.stat().st_size for file in folder.weight_files)
    return needed


def _open_context(
    recipe: Recipe,
    merged: Path,
    merge_manifest: MergeManifest,
    device: torch.device,
    progress: Progress | None,
) -> CalibrationContext:
    """Load samples, and open base and experts where something needs them.

    Raises:
        MismatchError: data or experts are missing, do not fit, or were changed since the merge.
    """

    @cache
    def experts() -> ExpertBackbone:
        sources = open_sources(recipe)
        check_unchanged(sources, merge_manifest)
        return ExpertBackbone(sources, device)

    family = family_of(merged)
    check_residuals(recipe.quantize, family)
    inputs = written_inputs(recipe.tasks, merged)
    samples = calibration_samples(recipe, family, merged, inputs)
    if QUANTIZATION_METHODS[recipe.quantize.method].uses_experts or unlabelled_tasks(samples):
        # Opened now, so that problems are reported before any long work.
        experts()
    return CalibrationContext(family, merged, samples, experts, device, progress)


def _arithmetic(options: QuantizeOptions, device: torch.device) -> str:
    """Return what codes depend on besides options and inputs, so that no blocks are mixed."""
    products = QUANTIZATION_METHODS[options.method].products_dtype(options)
    return f"{device.type} {products} {torch.get_num_threads()} threads"


def _quantize_model(
    recipe: Recipe, ctx: CalibrationContext, finished: FinishedWork
) -> tuple[QuantizedModel, _Decisions]:
    """Return the quantized model and the decisions that depended on models and data."""
    decisions: _Decisions = {}
    ctx = _with_answers(ctx, finished, decisions)
    ctx = _with_heads(recipe, ctx)
    options = _planned(recipe.quantize, ctx, finished, decisions)
    pull = _head_pull(recipe.quantize, decisions)
    model, quantized, distilled = quantize_in_phases(options, ctx, finished)
    decisions = {**decisions, **distilled}
    if rank := QUANTIZATION_METHODS[options.method].residual_rank(options):
        without = ctx.uncorrectable(model)
        decisions["residuals"] = _residual_details(rank, quantized, without)
    if pull is not None:
        quantized = replace(quantized, heads=refitted_heads(model, ctx, pull))
        decisions["refitted_heads"] = tuple(quantized.heads)
    return quantized, decisions


def _head_pull(options: QuantizeOptions, decisions: _Decisions) -> float | None:
    """Return the pull of re-fitted heads that was chosen, else the options'; None to keep heads."""
    choice = decisions.get("options")
    method = QUANTIZATION_METHODS[options.method]
    if method.residual_rank(options):
        # They would be fitted to what all tasks share.
        return None
    usual = method.head_pull(options)
    return usual if choice is None or choice.reason else choice.head_pull


def _residual_details(
    rank: int, quantized: QuantizedModel, without: Mapping[str, str]
) -> Residuals:
    """Return what the manifest says of corrections; log which layers have none."""
    size = quantized.residuals.packed_bytes
    packed = sum(layer.packed_bytes for layer in quantized.layers.values())
    for name, reason in without.items():
        log.warning("%s has no corrections for tasks: %s", name, reason)
    share = size / (packed + size)
    log.info(
        "corrections of rank %d for %d tasks: %d layers, %.1f KB, %.0f%% of what is stored",
        rank,
        len(quantized.residuals.tasks),
        len(quantized.residuals.layers),
        size / 1000,
        100 * share,
    )
    return Residuals(
        rank=rank,
        layers=len(quantized.residuals.layers),
        bytes=size,
        share=share,
        without=without,
    )


def _with_answers(
    ctx: CalibrationContext, finished: FinishedWork, decisions: _Decisions
) -> CalibrationContext:
    """Fill in pseudo-labels where data have no answers."""
    if not unlabelled_tasks(ctx.samples):
        return ctx

    def generate() -> dict[str, list[str]]:
        return generate_pseudo_labels(
            ctx.samples, ctx.family, ctx.folder, ctx.experts().become, ctx.progress
        )

    answers = finished.once("answers", dict[str, list[str]], generate)
    decisions["answers_by_experts"] = {task: len(texts) for task, texts in answers.items()}
    return replace(ctx, samples=with_pseudo_labels(ctx.samples, answers))


def _with_heads(recipe: Recipe, ctx: CalibrationContext) -> CalibrationContext:
    """Add heads of all tasks where the options need predictions of classifiers.

    Raises:
        RecipeError: a task has none.
    """
    compared = QUANTIZATION_METHODS[recipe.quantize.method].compares_predictions(recipe.quantize)
    if not compared or generates_text(ctx.family):
        return ctx
    features = ctx.family.embedding_width(ctx.family.load(ctx.folder), ctx.folder)
    heads = build_heads(recipe.tasks, ctx.family, ctx.folder, features, device=ctx.device)
    if problem := missing_heads(recipe.quantize, ctx.family, recipe.tasks, heads):
        raise RecipeError(problem)
    expert_heads = (
        heads_of_experts(recipe.tasks, ctx.experts().sources, heads, ctx.device) if heads else {}
    )
    classes = {task: head_classes(recipe.tasks[task], head) for task, head in heads.items()}
    return replace(ctx, heads=heads, expert_heads=expert_heads, classes=classes)


def _planned(
    options: QuantizeOptions,
    ctx: CalibrationContext,
    finished: FinishedWork,
    decisions: _Decisions,
) -> QuantizeOptions:
    """Settle the options that depend on the model: the anchor's strength, bits per layer."""
    method = QUANTIZATION_METHODS[options.method]
    if candidates := method.candidates(options):
        refit = method.may_refit_heads(options)
        choose = partial(choose_options, candidates, ctx, refit=refit)
        choice = finished.once("options", OptionChoice, choose)
        chosen = next((each for each in candidates if each.settings == choice.chosen), None)
        options, decisions["options"] = (chosen or candidates[0]).options, choice
    if search := method.anchor_search(options):
        anchor = finished.once("anchor", AnchorPlan, partial(plan_anchor, search, ctx))
        log.info("anchor auto: %g", anchor.anchor)
        options, decisions["anchor"] = search.options_with(anchor.anchor), anchor
    if options.target_bits is not None or options.target_size is not None:
        bits = finished.once("bits", BitPlan, partial(plan_bits, options, ctx))
        log.info("bits per layer: %.3f on average", bits.mean_bits)
        options, decisions["bits"] = with_bits(options, bits.layers), bits
    return options


def _details(
    merge_manifest: MergeManifest, quantized: QuantizedModel, decisions: _Decisions
) -> QuantizeDetails:
    solved = [report for report in quantized.reports if report.bits]

    def mean_of(values: Iterable[float]) -> float:
        return sum(values) / max(len(solved), 1)

    return QuantizeDetails(
        merge=merge_manifest.details,
        layers=len(solved),
        kept=tuple(report.layer for report in quantized.reports if report.status == "kept"),
        status=dict(Counter(report.status for report in quantized.reports)),
        input_statistics=len(quantized.inputs),
        mean_error_before=mean_of(report.error_before for report in solved),
        mean_error_after=mean_of(report.error_after for report in solved),
        **decisions,
    )


def _write(
    output: Path, merged: Path, quantized: QuantizedModel, manifest: QuantizeManifest
) -> QuantizeManifest:
    """Write the artifact with the merged model in it: all of it, or nothing."""
    with atomic_folder(output) as folder:
        shutil.copytree(merged, folder / MERGED_FOLDER, copy_function=_link_or_copy)
        save_artifact(folder, quantized)
        return finish_output(folder, manifest)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
