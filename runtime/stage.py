"""The eval stage: an export in, a report as JSON, Markdown and HTML out."""

import json
from pathlib import Path

import torch

from epmq_deploy.artifacts.card import Evaluation, write_card
from epmq_deploy.artifacts.folders import atomic_text, refuse_existing_file
from epmq_deploy.artifacts.locks import locked
from epmq_deploy.artifacts.manifest import read_manifest
from epmq_deploy.artifacts.names import EVAL_FILE, MANIFEST
from epmq_deploy.artifacts.space import explaining_full_disk
from epmq_deploy.errors import RecipeError
from epmq_deploy.models import family_of
from epmq_deploy.models.problem_types import EMBEDDING, TOKEN
from epmq_deploy.progress import Progress
from epmq_deploy.recipe import Recipe
from epmq_deploy.runtime.evaluation.evaluate import measure
from epmq_deploy.runtime.evaluation.report import EvalReport
from epmq_deploy.runtime.report.json_report import report_dict
from epmq_deploy.runtime.report.markdown import markdown_table
from epmq_deploy.runtime.report.page import html_page

# What the hub calls tasks that are neither text nor image classification.
_ON_HUB = {TOKEN: "token-classification", EMBEDDING: "sentence-similarity"}


def evaluate(
    recipe: Recipe,
    exported: Path,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    provider: str | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Measure every graph of an export and write what was measured.

    Gates are reported but not enforced; see ``check_gates``.

    Args:
        recipe: tasks and options.
        exported: folder of an export.
        output: JSON file to write; None for ``eval.json`` in the export's folder, whose model card
            then shows the evaluation, and where ``load`` looks for the graph to run.
        overwrite: whether earlier reports may be replaced.
        provider: onnxruntime's execution provider, in place of the recipe's.
        device: where experts run in torch, each on its own task.
        progress: shows one step per task, and one per setting that is timed.

    Raises:
        RecipeError: a report cannot be written or another run is writing it, ``exported`` is not an
            export, or the provider is not available or not really used.
        MismatchError: data or models do not fit; all at once.
    """
    file = output or exported / EVAL_FILE
    for path in (file, *views_of(file)):
        refuse_existing_file(path, overwrite=overwrite)
    with locked(file), explaining_full_disk(file):
        report = measure(recipe, exported, provider=provider, device=device, progress=progress)
        write_report(report, file)
    return report


def write_report(report: EvalReport, file: Path) -> None:
    """Write a report as JSON, Markdown and HTML; an export's own also into its model card."""
    markdown, page = views_of(file)
    table = markdown_table(report)
    atomic_text(file, json.dumps(report_dict(report), indent=2) + "\n")
    atomic_text(markdown, table)
    atomic_text(page, html_page(report))
    folder = file.parent
    if file.name == EVAL_FILE and (folder / MANIFEST).is_file():
        manifest = read_manifest(folder, "export")
        evaluation = Evaluation(
            table,
            family_of(folder).task_type,
            {row.name: row.accuracy for row in report.rows if row.files},
            report.hub_metrics,
            {
                task: _ON_HUB[kind]
                for task, kind in manifest.details.problem_types.items()
                if kind in _ON_HUB
            },
        )
        write_card(folder, manifest, evaluation)


def views_of(file: Path) -> tuple[Path, Path]:
    """Return the paths of a report's Markdown table and HTML page, next to its JSON file.

    Raises:
        RecipeError: ``file`` has the name of one of these.
    """
    if file.suffix in (".md", ".html"):
        raise RecipeError(f"{file}: name the JSON file; the others are written next to it")
    page = "report.html" if file.name == EVAL_FILE else f"{file.stem}.html"
    return file.with_suffix(".md"), file.with_name(page)
