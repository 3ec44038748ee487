"""All four stages in a row, each skipped when its output is already there."""

import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_deploy.artifacts.folders import (
    refuse_existing,
    refuse_existing_file,
    remove_leftovers,
    unfinished_folder,
)
from epmq_deploy.artifacts.locks import locked
from epmq_deploy.artifacts.manifest import AnyManifest, Stage
from epmq_deploy.artifacts.names import EVAL_FILE
from epmq_deploy.artifacts.outputs import is_done
from epmq_deploy.artifacts.space import require_space
from epmq_deploy.device import DeviceName, pick_device
from epmq_deploy.errors import EpmqError, MismatchError, RecipeError, all_problems, noted
from epmq_deploy.models.experts import Sources, open_available
from epmq_deploy.models.input_sources import inputs_of_experts
from epmq_deploy.models.sizes import weight_counts
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.recipe import EvalOptions, Recipe, Task

if TYPE_CHECKING:
    from epmq_deploy.runtime.evaluation.report import EvalReport

log = logging.getLogger(__name__)

MERGED, QUANTIZED, EXPORTED = "merged", "quantized", "exported"


@dataclass(frozen=True)
class _StageRun:
    """One stage that writes a folder.

    Attributes:
        name: of the stage.
        folder: it writes.
        fingerprint: of its output.
        work: runs it.
    """

    name: Stage
    folder: Path
    fingerprint: str
    work: Callable[[], AnyManifest]

    def is_done(self) -> bool:
        return is_done(self.folder, self.name, self.fingerprint)


def run(
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    device: DeviceName = "auto",
    progress: Progress | None = None,
) -> "EvalReport":
    """Merge, quantize, export and evaluate into the folders of ``output``.

    Stages whose output is already there, made from the same inputs, are skipped. Gates are reported
    but not enforced.

    Args:
        recipe: of all stages.
        output: folder that will hold ``merged``, ``quantized`` and ``exported``.
        overwrite: whether outputs made from other inputs may be replaced.
        device: where to compute.
        progress: shows how far each stage got.

    Raises:
        MismatchError: inputs of any stage do not fit; all at once, before any work.
        RecipeError: an output made from other inputs exists and may not be replaced, or another run
            is using one.
        DiskSpaceError: the disk has too little room; finished stages and blocks are kept.
    """
    progress = progress or NoProgress()
    with ExitStack() as locks:
        for name in (MERGED, QUANTIZED, EXPORTED):
            locks.enter_context(locked(output / name))
            remove_leftovers(output / name)
        return _run(recipe, output, overwrite=overwrite, device=device, progress=progress)


def _run(
    recipe: Recipe, output: Path, *, overwrite: bool, device: DeviceName, progress: Progress
) -> "EvalReport":
    """Run the stages that are not done; see ``run``."""
    from epmq_deploy.runtime.evaluation.evaluate import gates_of
    from epmq_deploy.runtime.stage import evaluate, write_report

    sources = preflight(recipe)
    common: dict[str, Any] = {
        "overwrite": overwrite,
        "device": pick_device(device),
        "progress": progress,
    }
    stages = _stages(recipe, output, sources, common)
    waiting = [stage for stage in stages if not stage.is_done()]
    for stage in waiting:
        refuse_existing(stage.folder, stage.name, overwrite=overwrite)
    _require_space(recipe, output, sources, {stage.name for stage in waiting})
    file = output / EXPORTED / EVAL_FILE
    report = None if waiting else _earlier_report(recipe, stages[-1].fingerprint, file, overwrite)
    for stage in stages:
        if stage in waiting:
            log.info("%s -> %s", stage.name, stage.folder)
            stage.work()
        else:
            log.info("%s: up to date, skipped", stage.folder)
            # Left by a run that was killed between its last two steps.
            shutil.rmtree(unfinished_folder(stage.folder), ignore_errors=True)
    if report is None:
        log.info("eval -> %s", file)
        provider = provider_for(recipe.eval, device)
        return evaluate(recipe, output / EXPORTED, provider=provider, **common)
    log.info("%s: up to date, skipped", file)
    # Gates do not affect measurements, so a report can be reused when only gates changed.
    report = replace(report, gates=gates_of(recipe.eval))
    write_report(report, file)
    return report


def _require_space(
    recipe: Recipe, output: Path, sources: Sources, waiting: Collection[Stage]
) -> None:
    """Make sure that the disk has room for the stages that are still to run."""
    from epmq_deploy.exporters.stage import exported_size
    from epmq_deploy.merging.output import merged_size
    from epmq_deploy.quantization.stage import codes_size

    counts = weight_counts(sources.base, sources.family)
    codes, exported = codes_size(counts), exported_size(recipe, counts)
    needed = merged_size(sources.base, recipe.merge) if "merge" in waiting else 0
    if "quantize" in waiting:
        # Finished blocks are kept until the whole is written.
        needed += max(2 * codes, codes + exported)
    elif "export" in waiting:
        needed += exported
    require_space(output, needed, "the run")


def provider_for(options: EvalOptions, device: DeviceName) -> str:
    """Return the provider that graphs run on: the one given, else that of the device."""
    return device if options.provider == "auto" else options.provider


def _earlier_report(
    recipe: Recipe, exported: str, file: Path, overwrite: bool
) -> "EvalReport | None":
    """Read the report of an earlier evaluation; None where there is none that still holds.

    Raises:
        RecipeError: a report of another evaluation is in the way.
    """
    from epmq_deploy.runtime.evaluation.evaluate import eval_fingerprint
    from epmq_deploy.runtime.report.json_report import read_report

    try:
        report = read_report(file)
    except RecipeError as error:
        # A damaged report is made again.
        log.warning("%s", error)
        return None
    if report is not None and report.fingerprint != eval_fingerprint(recipe, exported):
        refuse_existing_file(file, overwrite=overwrite)
        return None
    return report


def _stages(
    recipe: Recipe, output: Path, sources: Sources, common: Mapping[str, Any]
) -> list[_StageRun]:
    """Return the stages that write folders; each fingerprint follows from the one before."""
    from epmq_deploy.exporters.stage import export, export_fingerprint
    from epmq_deploy.merging.stage import merge, merge_fingerprint
    from epmq_deploy.quantization.stage import quantize, quantize_fingerprint

    merged, quantized, exported = (output / name for name in (MERGED, QUANTIZED, EXPORTED))
    first = merge_fingerprint(recipe, sources.sha256())
    second, _ = quantize_fingerprint(recipe, first)
    third, _ = export_fingerprint(recipe, second)
    return [
        _StageRun("merge", merged, first, lambda: merge(recipe, merged, **common)),
        _StageRun(
            "quantize", quantized, second, lambda: quantize(recipe, merged, quantized, **common)
        ),
        _StageRun("export", exported, third, lambda: export(recipe, quantized, exported, **common)),
    ]


def preflight(recipe: Recipe) -> Sources:
    """Check the inputs of all four stages before the first one starts; base and experts, opened.

    Raises:
        MismatchError: every problem found.
    """
    from epmq_deploy.data.heads import build_heads
    from epmq_deploy.data.loading import missing_data
    from epmq_deploy.exporters.browser.page import check_demo
    from epmq_deploy.exporters.targets.check import check_target
    from epmq_deploy.exporters.targets.choice import check_export
    from epmq_deploy.exporters.targets.layer_grid import planned_grids
    from epmq_deploy.merging import stage as merge_stage
    from epmq_deploy.merging.preflight import check_experts, other_inputs
    from epmq_deploy.quantization import stage as quantize_stage
    from epmq_deploy.quantization.sequential import check_patterns
    from epmq_deploy.runtime.evaluation.data import evaluation_samples

    sources, unopened = open_available(recipe)
    if sources is None:
        # Without models data cannot be checked further, but paths can.
        raise MismatchError("the recipe's inputs", [*unopened, *missing_data(recipe.tasks)])
    family, folder = sources.family, sources.base.folder
    inputs: dict[str, Path] = {}

    def check_inputs() -> None:
        other_inputs(sources, recipe.tasks)
        inputs.update(inputs_of_experts(recipe.tasks, sources))

    def check_model() -> None:
        quantize_stage.check_residuals(recipe.quantize, family)
        model = family.load(folder)
        check_patterns(model, family.blocks(model), recipe.quantize)
        grids = planned_grids(model, family.blocks(model), recipe.quantize)
        check_target(recipe.export, grids, recipe.quantize)
        features = family.embedding_width(model, folder)
        # Class names are all encoded later; one of each task shows that they can be.
        brief = {name: _brief(task) for name, task in recipe.tasks.items()}
        heads = build_heads(brief, family, folder, features)
        if problem := quantize_stage.missing_heads(recipe.quantize, family, recipe.tasks, heads):
            raise RecipeError(problem)

    checks: tuple[Callable[[], object], ...] = (
        lambda: merge_stage.check_options(recipe),
        lambda: quantize_stage.check_options(recipe),
        lambda: check_experts(
            sources,
            mixed_dtypes=recipe.merge.mixed_dtypes,
            missing_experts=bool(unopened),
        ),
        check_inputs,
        lambda: quantize_stage.calibration_samples(recipe, family, folder, inputs),
        lambda: check_export(recipe.export),
        lambda: check_demo(recipe, family),
        lambda: evaluation_samples(recipe, family, folder, inputs=inputs),
        check_model,
    )
    errors: list[EpmqError] = []
    if unopened:
        errors.append(MismatchError("models cannot be opened", unopened))
    for check in checks:
        with noted(errors):
            check()
    if errors:
        raise all_problems("the recipe's inputs", errors)
    return sources


def _brief(task: Task) -> Task:
    """Return the task with one class name and one template."""
    head = task.head
    if head is None or head.classes is None or not head.is_zero_shot:
        return task
    brief = head.model_copy(update={"classes": head.classes[:1], "templates": head.templates[:1]})
    return task.model_copy(update={"head": brief})
