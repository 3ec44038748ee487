"""All four stages in a row, each skipped when its output is already there."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_deploy.artifacts.folders import refuse_existing
from epmq_deploy.artifacts.manifest import AnyManifest, Stage
from epmq_deploy.artifacts.outputs import is_done
from epmq_deploy.cli.console import Terminal
from epmq_deploy.cli.evaluate import EVAL_FILE, evaluate_to, refuse_existing_file, write_and_show
from epmq_deploy.device import DeviceName, pick_device
from epmq_deploy.errors import EpmqError, MismatchError, RecipeError, all_problems, noted
from epmq_deploy.models.experts import Sources, open_available
from epmq_deploy.recipe import Recipe, Task

if TYPE_CHECKING:
    from epmq_deploy.runtime.report.model import EvalReport

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Stage:
    """One stage of the chain: what it is called, where it writes, what marks it done, the work."""

    name: Stage
    folder: Path
    mark: str
    work: Callable[[], AnyManifest]

    def is_done(self) -> bool:
        return is_done(self.folder, self.name, self.mark)


def run_all(
    recipe: Recipe, output: Path, device: DeviceName, overwrite: bool, terminal: Terminal
) -> None:
    """Merge, quantize, export and evaluate into ``output``.

    Raises:
        MismatchError: inputs of any stage do not fit; all at once, before any work.
        RecipeError: an output made from other inputs is there and ``overwrite`` is off.
        GateError: see the gates of ``eval``.
    """
    from epmq_deploy.runtime.evaluation.stage import eval_fingerprint, gates_of

    sources = preflight(recipe)
    common = {"overwrite": overwrite, "device": pick_device(device), "progress": terminal}
    stages = _stages(recipe, output, sources, common)
    file = output / "exported" / EVAL_FILE
    waiting = [stage for stage in stages if not stage.is_done()]
    for stage in waiting:
        refuse_existing(stage.folder, stage.name, overwrite=overwrite)
    report = None if waiting else _earlier_report(file)
    if report is not None and report.fingerprint != eval_fingerprint(recipe, stages[-1].mark):
        refuse_existing_file(file, overwrite)
        report = None

    for stage in stages:
        if stage in waiting:
            log.info("%s -> %s", stage.name, stage.folder)
            stage.work()
        else:
            log.info("%s: up to date, skipped", stage.folder)
    if report is not None:
        log.info("%s: up to date, skipped", file)
        # Gates decide nothing that was measured, so they may have changed.
        write_and_show(file, replace(report, gates=gates_of(recipe.eval)), terminal)
    else:
        log.info("eval -> %s", file)
        evaluate_to(file, recipe, output / "exported", device, overwrite, terminal)


def _earlier_report(file: Path) -> "EvalReport | None":
    """An evaluation's report; None where there is none, or a damaged one, which is made again."""
    from epmq_deploy.runtime.report.json import read_report

    try:
        return read_report(file)
    except RecipeError as error:
        log.warning("%s", error)
        return None


def _stages(recipe: Recipe, output: Path, sources: Sources, common: dict[str, Any]) -> list[_Stage]:
    """The three stages that write folders; each one's mark follows from the one before."""
    from epmq_deploy.exporters.stage import export, export_fingerprint
    from epmq_deploy.merging.stage import merge, merge_fingerprint
    from epmq_deploy.quantization.stage import quantize, quantize_fingerprint

    merged, quantized, exported = output / "merged", output / "quantized", output / "exported"
    first = merge_fingerprint(recipe, sources.sha256())
    second, _ = quantize_fingerprint(recipe, first)
    third, _ = export_fingerprint(recipe, second)
    return [
        _Stage("merge", merged, first, partial(merge, recipe, merged, **common)),
        _Stage(
            "quantize", quantized, second, partial(quantize, recipe, merged, quantized, **common)
        ),
        _Stage("export", exported, third, partial(export, recipe, quantized, exported, **common)),
    ]


def preflight(recipe: Recipe) -> Sources:
    """Check the inputs of all four stages before the first one starts; base and experts, opened.

    Raises:
        MismatchError: every problem found.
    """
    from epmq_deploy.data.heads import build_heads
    from epmq_deploy.data.samples import missing_data
    from epmq_deploy.exporters.browser.page import check_demo
    from epmq_deploy.exporters.targets.check import check_target
    from epmq_deploy.exporters.targets.layer_grid import planned_grids
    from epmq_deploy.exporters.targets.registry import check_export
    from epmq_deploy.merging import stage as merge_stage
    from epmq_deploy.merging.preflight import check_experts
    from epmq_deploy.quantization import stage as quantize_stage
    from epmq_deploy.quantization.sequential import check_patterns
    from epmq_deploy.runtime.evaluation.data import evaluation_samples

    sources, unopened = open_available(recipe)
    if sources is None:
        # Without models data cannot be checked further, but paths can.
        raise MismatchError("the recipe's inputs", [*unopened, *missing_data(recipe.tasks)])
    family, folder = sources.family, sources.base.folder

    def check_model() -> None:
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
        lambda: quantize_stage.calibration_samples(recipe, family, folder),
        lambda: check_export(recipe.export),
        lambda: check_demo(recipe.export, family),
        lambda: evaluation_samples(recipe, family, folder),
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
    """The task with one class name and one template."""
    head = task.head
    if head is None or head.classes is None:
        return task
    brief = head.model_copy(update={"classes": head.classes[:1], "templates": head.templates[:1]})
    return task.model_copy(update={"head": brief})
