"""All four stages in a row, each skipped when its output is already there."""

import logging
from collections.abc import Callable
from pathlib import Path

from epmq_deploy.cli.console import Terminal
from epmq_deploy.cli.evaluate import EVAL_FILE, evaluate_to, show
from epmq_deploy.device import DeviceName, pick_device
from epmq_deploy.errors import EpmqError, MismatchError
from epmq_deploy.recipe import Recipe
from epmq_deploy.stage import Manifest, is_done, read_manifest, refuse_existing

log = logging.getLogger(__name__)


def run_all(
    recipe: Recipe, output: Path, device: DeviceName, overwrite: bool, terminal: Terminal
) -> None:
    """Merge, quantize, export and evaluate into ``output``.

    Raises:
        MismatchError: inputs of any stage do not fit; all at once, before any work.
        RecipeError: an output made from other inputs is there and ``overwrite`` is off.
        GateError: see ``eval.max_drop``.
    """
    from epmq_deploy.exporters.export_stage import export, export_fingerprint
    from epmq_deploy.merging.merge import merge, merge_fingerprint, open_experts
    from epmq_deploy.quantization.quantize import quantize, quantize_fingerprint
    from epmq_deploy.runtime.evaluation import eval_fingerprint
    from epmq_deploy.runtime.report import read_report

    torch_device = pick_device(device)
    preflight(recipe)
    merged, quantized, exported = output / "merged", output / "quantized", output / "onnx"

    def stage(name: str, folder: Path, mark: str, work: Callable[[], Manifest]) -> Manifest:
        if is_done(folder, name, mark):
            log.info("%s: up to date, skipped", folder)
            return read_manifest(folder, name)
        refuse_existing(folder, overwrite)
        log.info("%s -> %s", name, folder)
        return work()

    made = stage(
        "merge",
        merged,
        merge_fingerprint(recipe, open_experts(recipe))[0],
        lambda: merge(recipe, merged, overwrite=overwrite, device=torch_device, progress=terminal),
    )
    made = stage(
        "quantize",
        quantized,
        quantize_fingerprint(recipe, made)[0],
        lambda: quantize(
            recipe, merged, quantized, overwrite=overwrite, device=torch_device, progress=terminal
        ),
    )
    made = stage(
        "export",
        exported,
        export_fingerprint(recipe, made)[0],
        lambda: export(
            recipe,
            quantized,
            exported,
            overwrite=overwrite,
            device=torch_device,
            progress=terminal,
        ),
    )
    report = read_report(exported / EVAL_FILE)
    if report is not None and report.fingerprint == eval_fingerprint(recipe, made):
        log.info("%s: up to date, skipped", exported / EVAL_FILE)
        show(report, recipe.eval.max_drop, terminal)
    else:
        log.info("eval -> %s", exported / EVAL_FILE)
        evaluate_to(exported / EVAL_FILE, recipe, exported, device, overwrite, terminal)


def preflight(recipe: Recipe) -> None:
    """Check the inputs of all four stages before the first one starts.

    Raises:
        MismatchError: every problem found.
    """
    from epmq_deploy.exporters import formats_of
    from epmq_deploy.merging.merge import check_models
    from epmq_deploy.quantization.quantize import calibration_samples
    from epmq_deploy.runtime.evaluation import check_evaluation

    problems: list[str] = []
    for check in (
        lambda: check_models(recipe),
        lambda: calibration_samples(recipe),
        lambda: formats_of(recipe.export.formats),
        lambda: check_evaluation(recipe),
    ):
        try:
            check()
        except MismatchError as error:
            problems += error.problems
        except EpmqError as error:
            problems.append(str(error))
    if problems:
        raise MismatchError("the recipe's inputs", problems)
