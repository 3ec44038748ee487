"""The export stage: the quantized artifact in, a folder of verified ONNX files out."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from epmq_deploy.artifacts.folders import atomic_folder, reserved
from epmq_deploy.artifacts.manifest import (
    ExportDetails,
    ExportManifest,
    GraphEntry,
    Parity,
    QuantizeManifest,
    fingerprint,
)
from epmq_deploy.artifacts.outputs import finish_output, open_output
from epmq_deploy.artifacts.space import require_space
from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.data.heads import head_classes, heads_sha256, leaves_head_to_expert, save_heads
from epmq_deploy.exporters.browser.page import check_demo, check_demo_model, write_demo
from epmq_deploy.exporters.formats import FORMATS
from epmq_deploy.exporters.formats.base import ExportContext
from epmq_deploy.exporters.graphs.build import FP32_FORMAT, by_kind, write_graphs
from epmq_deploy.exporters.graphs.corrections import mixed_tasks, torch_outputs_of_tasks
from epmq_deploy.exporters.graphs.quantized_backbone import quantized_layers
from epmq_deploy.exporters.graphs.specs import Part, parts_of
from epmq_deploy.exporters.memory import (
    eager_free,
    map_weights,
    release_memory,
    release_weights_after_use,
)
from epmq_deploy.exporters.targets import TARGETS
from epmq_deploy.exporters.targets.check import check_target
from epmq_deploy.exporters.targets.choice import (
    check_export,
    chosen_formats,
    chosen_two_bit_containers,
)
from epmq_deploy.exporters.targets.layer_grid import LayerGrid
from epmq_deploy.exporters.verification.graphs import ExportedGraph, WrittenGraph, verify_graph
from epmq_deploy.exporters.verification.parity import (
    Outputs,
    ParityInputs,
    measure_parity,
    torch_outputs,
)
from epmq_deploy.models import TaskHead, family_of
from epmq_deploy.models.deployable import MultiTaskModel
from epmq_deploy.models.experts import check_unchanged, open_sources
from epmq_deploy.models.input_sources import copy_inputs, written_inputs
from epmq_deploy.models.problem_types import SINGLE_LABEL
from epmq_deploy.models.sizes import WeightCounts, weight_counts
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.quantization.artifact import (
    REPORT_FILE,
    load_artifact,
    load_inputs,
    load_refitted_heads,
)
from epmq_deploy.quantization.residuals.artifact import load_residuals
from epmq_deploy.quantization.residuals.factors import ModelResiduals
from epmq_deploy.quantization.results import QuantizedLinear
from epmq_deploy.quantization.stage import MERGED_FOLDER
from epmq_deploy.recipe import ExportOptions, Recipe
from epmq_deploy.runtime.ort.graph_runs import session_config

# Where transformers.js and optimum look for graphs.
GRAPHS_FOLDER = "onnx"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Written:
    """What is left of the model once its graphs are written.

    Attributes:
        graphs: by part.
        outputs: what torch computes for each part: merged and quantized.
        samples: what it computes that from.
        heads: by task.
        codes: sha256 by layer.
        tasks: that low-bit graphs' input ``task`` numbers; empty where they have none.
    """

    graphs: Sequence[Sequence[WrittenGraph]]
    outputs: Sequence[tuple[Outputs, Outputs]]
    samples: Sequence[ParityInputs]
    heads: Mapping[str, TaskHead]
    codes: Mapping[str, str]
    tasks: tuple[str, ...]


def export_fingerprint(recipe: Recipe, quantized: str) -> tuple[str, dict[str, str]]:
    """Return the fingerprint of an export of that quantization, and hashes of its inputs."""
    inputs = {"quantize": quantized, **heads_sha256(recipe.tasks)}
    # Where libraries are copied from does not decide what is copied.
    export = recipe.export.model_dump(mode="json", exclude={"demo_libraries"})
    return fingerprint("export", export, inputs), inputs


def export(
    recipe: Recipe,
    quantized: Path,
    output: Path,
    *,
    overwrite: bool = False,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> ExportManifest:
    """Write the fp32 merged model and every format of the recipe, with settings and heads.

    Raises:
        RecipeError: the output exists or another run is using it, the input is no quantized
            artifact, or a format cannot hold a layer.
        MismatchError: a head does not fit the model, or is that of an expert that was changed.
        DiskSpaceError: the disk has too little room.
        NumericsError: a written file does not hold the solver's codes, does not run them in a
            low-bit kernel, or differs from torch by more than its format's tolerance.
    """
    progress = progress or NoProgress()
    with reserved(output, "export", overwrite=overwrite, source=quantized):
        check_export(recipe.export)
        options = recipe.export
        source = open_output(quantized, "quantize")
        require_space(output, _needed_space(recipe, quantized), "the export")
        identity, inputs = export_fingerprint(recipe, source.fingerprint)
        family = family_of(quantized / MERGED_FOLDER)
        check_demo(recipe, family)
        written_inputs(recipe.tasks, quantized / MERGED_FOLDER)
        if any(leaves_head_to_expert(task, family) for task in recipe.tasks.values()):
            check_unchanged(open_sources(recipe), source)
        with atomic_folder(output) as folder:
            written = _write(recipe, source, quantized, folder, device=device, progress=progress)
            # Sessions need the memory that the model took.
            release_memory()
            graphs = [[verify_graph(graph) for graph in of_part] for of_part in written.graphs]
            parities = _parities(graphs, written, options)
            classes = {
                name: head_classes(recipe.tasks[name], head).names
                for name, head in written.heads.items()
            }
            _add_files(folder, quantized, written.heads)
            if options.demo:
                shown = next(
                    graph for graph in graphs[0] if graph.format == chosen_formats(options)[0]
                )
                write_demo(folder, family, classes, shown.path, options, written.tasks)
            details = ExportDetails(
                merge=source.details.merge,
                target=TARGETS.named(options.target).recorded() if options.target else None,
                classes=classes,
                problem_types={
                    name: head.problem_type
                    for name, head in written.heads.items()
                    if head.problem_type != SINGLE_LABEL
                },
                graphs=tuple(
                    _entry(graph, parities[graph.path], folder, options, written.tasks)
                    for of_part in graphs
                    for graph in of_part
                ),
                parity_inputs=written.samples[0].kind,
                tasks_without_parity=written.samples[0].missing,
                codes=written.codes,
            )
            _explain_target(options)
            manifest = ExportManifest(
                fingerprint=identity, recipe=recipe, inputs=inputs | source.models, details=details
            )
            return finish_output(folder, manifest)


def exported_size(recipe: Recipe, counts: WeightCounts) -> int:
    """Return how many bytes all graphs take at least."""
    bits = recipe.quantize.target_bits or recipe.quantize.bits
    outside = counts.deployed - counts.in_blocks
    sizes = [4 * counts.deployed]
    for name in set(chosen_formats(recipe.export)) - {FP32_FORMAT}:
        low_bit = FORMATS[name].low_bit
        sizes.append(int(counts.in_blocks * bits / 8) + outside if low_bit else 2 * counts.deployed)
    return sum(sizes)


def _needed_space(recipe: Recipe, quantized: Path) -> int:
    """Return how many bytes an export takes at least."""
    merged = quantized / MERGED_FOLDER
    family = family_of(merged)
    checkpoint = Checkpoint.open(ModelFolder.at(merged), family.canonical_key, family.tied)
    return exported_size(recipe, weight_counts(checkpoint, family))


def _add_files(folder: Path, quantized: Path, heads: Mapping[str, TaskHead]) -> None:
    """Add what stands next to the graphs: the model's settings, heads, the layers' report."""
    merged = quantized / MERGED_FOLDER
    ModelFolder.at(merged).copy_settings(folder)
    copy_inputs(merged, folder)
    if heads:
        save_heads(folder, heads)
    # The evaluation's page shows how each layer fared.
    shutil.copyfile(quantized / REPORT_FILE, folder / REPORT_FILE)


def _explain_target(options: ExportOptions) -> None:
    """Log why a target's formats and constraints are what they are, and what is not verified."""
    if options.target is None:
        return
    target = TARGETS.named(options.target)
    log.info("target %s: %s", target.name, target.why)
    if target.unverified:
        log.info("not verified: %s", target.unverified)


def _write(
    recipe: Recipe,
    source: QuantizeManifest,
    quantized: Path,
    folder: Path,
    *,
    device: torch.device | None,
    progress: Progress,
) -> _Written:
    """Write all graphs below a folder; the model is in memory no longer than this takes."""
    graphs_folder = folder / GRAPHS_FOLDER
    graphs_folder.mkdir()
    options, merged = recipe.export, quantized / MERGED_FOLDER
    family = family_of(merged)
    layers, replaced = load_artifact(quantized)
    refitted = load_refitted_heads(quantized)
    residuals = load_residuals(quantized)
    with eager_free():
        backbone = family.load(merged)
        checkpoint = Checkpoint.open(ModelFolder.at(merged), family.canonical_key, family.tied)
        map_weights(backbone, checkpoint.tensors)
    groups = tuple(group for block in family.blocks(backbone) for group in block.groups)
    inside = {name for group in groups for name in group.layers}
    grids = {
        name: LayerGrid.of(layer, outer=name not in inside)
        for name, layer in by_kind(backbone, layers)[0].items()
    }
    check_target(options, grids, source.recipe.quantize)
    with release_weights_after_use(backbone):
        parts, heads = parts_of(
            recipe.tasks, family, backbone, merged, device=device, progress=progress
        )
    check_demo_model(
        options, family, merged, {name: head.problem_type for name, head in heads.items()}
    )
    graphs = [
        write_graphs(
            part.model,
            part.example,
            part.layers_of(layers),
            replaced,
            chosen_formats(options),
            graphs_folder,
            opset=options.opset,
            accuracy_level=options.accuracy_level,
            two_bit_containers=chosen_two_bit_containers(options),
            context=ExportContext(options, load_inputs(quantized), groups),
            heads=refitted,
            residuals=residuals,
        )
        for part in parts
    ]
    codes = {name: layers[name].codes_sha256() for name in sorted(layers)}
    outputs = _torch_outputs(parts, layers, replaced, refitted, residuals)
    samples = [part.samples for part in parts]
    return _Written(graphs, outputs, samples, heads, codes, residuals.tasks)


def _entry(
    graph: ExportedGraph,
    parity: Parity,
    folder: Path,
    options: ExportOptions,
    tasks: tuple[str, ...],
) -> GraphEntry:
    """Return what the manifest says of a graph."""
    low_bit = FORMATS[graph.format].low_bit
    return GraphEntry(
        format=graph.format,
        part=graph.part,
        file=graph.path.relative_to(folder).as_posix(),
        bytes=graph.bytes,
        opset=graph.opset,
        low_bit=low_bit,
        low_bit_nodes=graph.low_bit_nodes,
        session_options=session_config(options.accuracy_level),
        parity=parity,
        layers=graph.layers,
        **({"task_input": tasks} if low_bit and tasks else {}),
    )


def _torch_outputs(
    parts: Sequence[Part],
    layers: Mapping[str, QuantizedLinear],
    replaced: Mapping[str, Tensor],
    heads: Mapping[str, TaskHead],
    residuals: ModelResiduals,
) -> list[tuple[Outputs, Outputs]]:
    """Return what torch computes for each part: merged and quantized, which has its own heads."""
    merged = [torch_outputs(part.model, part.samples.batches) for part in parts]
    for part in parts:
        if isinstance(part.model, MultiTaskModel):
            part.model.replace_heads(heads)
    # All parts share it.
    with quantized_layers(parts[0].model.backbone, layers, replaced):
        quantized = [
            torch_outputs_of_tasks(part.model, part.samples.batches, residuals) for part in parts
        ]
        return list(zip(merged, quantized, strict=True))


def _parities(
    graphs: Sequence[Sequence[ExportedGraph]], written: _Written, options: ExportOptions
) -> dict[Path, Parity]:
    """Compare every graph with torch, by file."""
    parts = zip(graphs, written.outputs, written.samples, strict=True)
    return {
        graph.path: measure_parity(
            graph,
            quantized if FORMATS[graph.format].low_bit else merged,
            mixed_tasks(inputs.batches, len(written.tasks))
            if FORMATS[graph.format].low_bit and written.tasks
            else inputs.batches,
            options.accuracy_level,
            inputs.real,
        )
        for of_part, (merged, quantized), inputs in parts
        for graph in of_part
    }
