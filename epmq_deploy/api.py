"""The Python API: the stages of the command line as functions, without a terminal."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_deploy.artifacts.manifest import (
    ExportManifest,
    MergeManifest,
    QuantizeManifest,
    Stage,
    read_manifest,
)
from epmq_deploy.artifacts.outputs import StageOutput
from epmq_deploy.device import DeviceName, pick_device
from epmq_deploy.progress import Progress
from epmq_deploy.recipe import Preflight, Recipe, load_recipe, override, with_preflight

if TYPE_CHECKING:
    from epmq_deploy.runtime.evaluation.report import EvalReport
    from epmq_deploy.runtime.inference.classifier import ExportedClassifier
    from epmq_deploy.runtime.inference.text_generation import ExportedTextGenerator

AnyPath = str | os.PathLike[str]


def merge(
    recipe: Recipe | AnyPath,
    output: AnyPath,
    *,
    overwrite: bool = False,
    device: DeviceName = "auto",
    progress: Progress | None = None,
    preflight: Preflight | None = None,
    **options: Any,
) -> StageOutput[MergeManifest]:
    """Merge the recipe's experts into one model.

    Args:
        recipe: a recipe, or its YAML file.
        output: folder to write.
        overwrite: whether an earlier output may be replaced.
        device: where to compute: ``auto``, ``cpu`` or ``cuda``.
        progress: shows how far the work got.
        preflight: which images are decoded before any work, in place of the recipe's choice:
            ``full``, ``sampled`` or ``auto``.
        **options: keys of the recipe's ``merge`` section, which they override.

    Raises:
        MismatchError: models, data or heads do not fit; all problems at once, before any work.
        RecipeError: the output exists, or an option is not allowed.
        NumericsError: a merged value is NaN or infinite.
    """
    from epmq_deploy.merging.stage import merge

    changed = with_preflight(override(_recipe(recipe), "merge", options), preflight)
    folder = Path(output)
    manifest = merge(
        changed, folder, overwrite=overwrite, device=pick_device(device), progress=progress
    )
    return StageOutput(folder, manifest)


def quantize(
    merged: AnyPath,
    output: AnyPath,
    *,
    recipe: Recipe | AnyPath | None = None,
    overwrite: bool = False,
    device: DeviceName = "auto",
    progress: Progress | None = None,
    preflight: Preflight | None = None,
    **options: Any,
) -> StageOutput[QuantizeManifest]:
    """Quantize a merged model to integer codes.

    After an interruption, the same call resumes after the last finished block, with the same codes.

    Args:
        merged: output of ``merge``, or its folder.
        output: folder to write.
        recipe: tasks and options; default: those that the merged model was made with.
        overwrite: whether an earlier output may be replaced.
        device: where to compute: ``auto``, ``cpu`` or ``cuda``.
        progress: shows how far the work got.
        preflight: which images are decoded before any work, in place of the recipe's choice:
            ``full``, ``sampled`` or ``auto``.
        **options: keys of the recipe's ``quantize`` section, which they override.

    Raises:
        MismatchError: calibration data or experts are missing or do not fit; all at once.
        RecipeError: the output exists, ``merged`` is not a merged model, or an option is not
            allowed.
        NumericsError: values are NaN or infinite, or a layer's Hessian cannot be factored.
    """
    from epmq_deploy.quantization.stage import quantize

    changed = with_preflight(
        override(_recipe(recipe, merged, "merge"), "quantize", options), preflight
    )
    folder = Path(output)
    manifest = quantize(
        changed,
        Path(merged),
        folder,
        overwrite=overwrite,
        device=pick_device(device),
        progress=progress,
    )
    return StageOutput(folder, manifest)


def export(
    quantized: AnyPath,
    output: AnyPath,
    *,
    recipe: Recipe | AnyPath | None = None,
    overwrite: bool = False,
    device: DeviceName = "auto",
    progress: Progress | None = None,
    **options: Any,
) -> StageOutput[ExportManifest]:
    """Write the merged model in float32 and its codes in every chosen format as ONNX files.

    Args:
        quantized: output of ``quantize``, or its folder.
        output: folder to write.
        recipe: tasks and options; default: those that the quantized model was made with.
        overwrite: whether an earlier output may be replaced.
        device: where heads from class names are computed: ``auto``, ``cpu`` or ``cuda``.
        progress: shows how far the work got.
        **options: keys of the recipe's ``export`` section, which they override.

    Raises:
        RecipeError: the output exists, ``quantized`` is not a quantized model, or a format or
            target does not support a layer.
        MismatchError: a head does not fit the model.
        NumericsError: a file does not hold exactly the codes chosen, would not run them in a
            low-bit kernel, or differs from torch by more than its format's tolerance.
    """
    from epmq_deploy.exporters.stage import export

    changed = override(_recipe(recipe, quantized, "quantize"), "export", options)
    folder = Path(output)
    manifest = export(
        changed,
        Path(quantized),
        folder,
        overwrite=overwrite,
        device=pick_device(device),
        progress=progress,
    )
    return StageOutput(folder, manifest)


def evaluate(
    exported: AnyPath,
    output: AnyPath | None = None,
    *,
    recipe: Recipe | AnyPath | None = None,
    overwrite: bool = False,
    device: DeviceName = "auto",
    progress: Progress | None = None,
    preflight: Preflight | None = None,
    **options: Any,
) -> "EvalReport":
    """Run every exported graph in onnxruntime on every task, compare, and write the report.

    Writes ``eval.json``, ``eval.md`` and ``report.html``, and the evaluation section of the model
    card. Gates are reported but not enforced; see ``check_gates``.

    Args:
        exported: output of ``export``, or its folder.
        output: JSON file to write; default: ``eval.json`` in the exported folder.
        recipe: tasks and options; default: those that the export was made with.
        overwrite: whether earlier reports may be replaced.
        device: where experts run in torch, and graphs unless ``provider`` is given.
        progress: shows how far the work got.
        preflight: which images are decoded before any work, in place of the recipe's choice:
            ``full``, ``sampled`` or ``auto``.
        **options: keys of the recipe's ``eval`` section, which they override.

    Raises:
        MismatchError: data or models do not fit; all at once.
        RecipeError: a report exists, ``exported`` is not an export, an option is not allowed, or
            the provider is not available or does not run the graphs.
    """
    from epmq_deploy.pipeline import provider_for
    from epmq_deploy.runtime.stage import evaluate

    changed = with_preflight(
        override(_recipe(recipe, exported, "export"), "eval", options), preflight
    )
    return evaluate(
        changed,
        Path(exported),
        None if output is None else Path(output),
        overwrite=overwrite,
        provider=provider_for(changed.eval, device),
        device=pick_device(device),
        progress=progress,
    )


def run(
    recipe: Recipe | AnyPath,
    output: AnyPath,
    *,
    overwrite: bool = False,
    device: DeviceName = "auto",
    progress: Progress | None = None,
    preflight: Preflight | None = None,
) -> "EvalReport":
    """Merge, quantize, export and evaluate, each stage into its folder in ``output``.

    Stages that already have an output made from the same inputs are skipped.

    Args:
        recipe: a recipe, or its YAML file.
        output: folder that will hold ``merged``, ``quantized`` and ``exported``.
        overwrite: whether outputs made from other inputs may be replaced.
        device: where to compute: ``auto``, ``cpu`` or ``cuda``.
        progress: shows how far each stage got.
        preflight: which images are decoded before any work, in place of the recipe's choice:
            ``full``, ``sampled`` or ``auto``.

    Raises:
        MismatchError: inputs of any stage do not fit; all at once, before any work.
        RecipeError: an output made from other inputs exists and may not be replaced.
        NumericsError: see the stages.
    """
    from epmq_deploy.pipeline import run

    changed = with_preflight(_recipe(recipe), preflight)
    return run(changed, Path(output), overwrite=overwrite, device=device, progress=progress)


def check_gates(report: "EvalReport") -> None:
    """Make sure that at least one low-bit graph meets all gates of the recipe's ``eval`` section.

    Raises:
        GateError: none does; lists every miss.
    """
    from epmq_deploy.runtime.evaluation.gates import check_gates

    check_gates(report)


def load(
    exported: AnyPath,
    *,
    format: str | None = None,
    provider: str = "auto",
    threads: int | None = None,
    batch_size: int = 32,
    max_tokens: int | None = None,
    scores: bool = True,
) -> "ExportedClassifier | ExportedTextGenerator":
    """Open an exported model in an application.

    Args:
        exported: output of ``export``, or its folder.
        format: graphs to run, e.g. ``matmulnbits``; default: those the evaluation recommends, or
            the first low-bit ones where nothing was evaluated.
        provider: onnxruntime's execution provider; ``auto`` is CUDA if available, else the CPU.
        threads: intra-op threads; default: as many as the cores that affinity and container leave
            this process. One opened model may be shared by threads.
        batch_size: inputs per run.
        max_tokens: longest generated text; default: that of the evaluation.
        scores: for text generation, whether to compute probabilities of a task's listed answers,
            which takes one step for each of their tokens.

    Raises:
        RecipeError: the folder is no export or has no such format; its evaluation is damaged or
            recommends no graph; an option does not apply to this model; the provider is not
            available, or does not run the graph.
        NumericsError: onnxruntime cannot load the graph.
    """
    from epmq_deploy.runtime.inference.load import load

    return load(
        Path(exported),
        format=format,
        provider=provider,
        threads=threads,
        batch_size=batch_size,
        max_tokens=max_tokens,
        scores=scores,
    )


def _recipe(
    recipe: Recipe | AnyPath | None, folder: AnyPath = "", stage: Stage = "merge"
) -> Recipe:
    """Return the recipe given, else the one that a stage's folder was made with."""
    if recipe is None:
        return read_manifest(Path(folder), stage).recipe
    return recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
