"""Open an exported model in an application: images or texts in; labels, scores or texts out.

    from epmq_deploy.runtime import load

    model = load("exported")
    model("cat.jpg")["animals"].label

Needs onnxruntime and what preprocesses inputs: transformers, torch and Pillow.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from epmq_deploy.artifacts.manifest import GraphEntry, read_manifest
from epmq_deploy.data.heads import load_heads
from epmq_deploy.errors import RecipeError
from epmq_deploy.models import family_of
from epmq_deploy.models.embedding_head import EmbeddingHead
from epmq_deploy.models.input_sources import written_inputs
from epmq_deploy.models.problem_types import EMBEDDING
from epmq_deploy.models.text_generation.base import generates_text
from epmq_deploy.runtime.evaluation.text_scoring import open_text_generator
from epmq_deploy.runtime.inference.classifier import ExportedClassifier, is_answer
from epmq_deploy.runtime.inference.text_generation import ExportedTextGenerator
from epmq_deploy.runtime.ort.providers import AUTO
from epmq_deploy.runtime.ort.sessions import Graph, by_format


def load(
    folder: str | Path,
    *,
    format: str | None = None,
    provider: str = AUTO,
    threads: int | None = None,
    batch_size: int = 32,
    max_tokens: int | None = None,
    scores: bool = True,
) -> ExportedClassifier | ExportedTextGenerator:
    """Open an exported model.

    Args:
        folder: output of ``epmq export``.
        format: graphs to run, e.g. ``matmulnbits``; default: the ones that ``epmq eval``
            recommended, or the first low-bit ones if nothing was evaluated.
        provider: see `epmq_deploy.runtime.ort.providers.provider_named`.
        threads: intra-op threads, 1 or more; default: see `usable_cores`.
        batch_size: inputs per run, 1 or more.
        max_tokens: for text generation, the longest text; default: that of the evaluation.
        scores: for text generation, whether to compute probabilities of a task's listed answers,
            which takes one step for each of their tokens.

    Raises:
        RecipeError: the folder is no export or has no such format; its evaluation is damaged or
            recommends no graph; an option does not apply to this model, or a count is below 1;
            the provider is not installed, or does not run the graph.
        NumericsError: onnxruntime cannot load the graph.
    """
    counts = {"batch_size": batch_size, "threads": threads, "max_tokens": max_tokens}
    wrong = {name: count for name, count in counts.items() if count is not None and count < 1}
    if wrong:
        raise RecipeError(
            "; ".join(f"{name} is {count}; give 1 or more" for name, count in wrong.items())
        )
    path = Path(folder)
    manifest = read_manifest(path, "export")
    family = family_of(path)
    formats = by_format(manifest.graphs)
    chosen = formats.get(format or _recommended(path, formats))
    if chosen is None:
        raise RecipeError(f"{path} has no graph of format {format!r}; it has {', '.join(formats)}")
    if generates_text(family):
        longest = manifest.recipe.eval.max_tokens if max_tokens is None else max_tokens
        generator = open_text_generator(
            family, path, chosen, provider=provider, threads=threads, max_tokens=longest
        )
        return ExportedTextGenerator(
            generator, family, path, manifest.recipe.tasks, batch_size, scores=scores
        )
    if max_tokens is not None or not scores:
        raise RecipeError(f"{path} is a classifier; max_tokens and scores are for text generation")
    graph = Graph.exported(path, chosen[0], provider=provider, threads=threads)
    if not any(map(is_answer, graph.output_names)):
        raise RecipeError(f"{path / chosen[0].file} has no output of a task (logits_<task>)")
    tasks = manifest.recipe.tasks
    details = manifest.details
    embedding = EMBEDDING in details.problem_types.values()
    embeddings = {
        name: head.settings
        for name, head in (load_heads(path) if embedding else {}).items()
        if isinstance(head, EmbeddingHead)
    }
    pairs = {
        name: pair
        for name, task in tasks.items()
        if name not in embeddings and (pair := task.text_pair) is not None
    }
    return ExportedClassifier(
        graph,
        family,
        path,
        written_inputs(tasks, path),
        details.classes,
        details.problem_types,
        pairs,
        embeddings,
        batch_size,
    )


def _recommended(folder: Path, entries: Mapping[str, Sequence[GraphEntry]]) -> str:
    """Return the format that the evaluation recommends, or else the first low-bit one."""
    from epmq_deploy.runtime.evaluation.gates import NONE_RECOMMENDED, recommend
    from epmq_deploy.runtime.report.json_report import read_report

    file = folder / "eval.json"
    try:
        report = read_report(file)
    except RecipeError as error:
        raise RecipeError(f"{error}, or choose a graph with format=...") from error
    low_bit = [name for name, graphs in entries.items() if graphs[0].low_bit]
    if report is None or not low_bit:
        return next(iter(low_bit or entries))
    advice = recommend(report)
    if advice is None:
        raise RecipeError(f"{file}: {NONE_RECOMMENDED}; choose one with format=...")
    return advice.format
