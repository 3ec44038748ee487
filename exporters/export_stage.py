"""The export stage: the quantized artifact in, a folder of verified ONNX files out."""

from pathlib import Path

import torch

from epmq_deploy.checkpoints import copy_settings
from epmq_deploy.experts import check_unchanged, open_sources
from epmq_deploy.exporters.export import export_graphs
from epmq_deploy.exporters.formats import formats_of
from epmq_deploy.exporters.session import session_config
from epmq_deploy.models import MultiTaskModel, family_of
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.quantization.artifact import load_artifact
from epmq_deploy.quantization.quantize import MERGED_FOLDER
from epmq_deploy.recipe import Recipe
from epmq_deploy.stage import (
    Manifest,
    atomic_folder,
    file_sha256,
    fingerprint,
    model_inputs,
    open_output,
    refuse_existing,
    write_manifest,
)
from epmq_deploy.tasks.heads import build_heads, leaves_head_to_expert, save_heads

# Where transformers.js and optimum look for graphs.
GRAPHS_FOLDER = "onnx"


def export_fingerprint(recipe: Recipe, quantized: str) -> tuple[str, dict[str, str]]:
    """What decides the files, after a quantization of that fingerprint; also input hashes."""
    inputs = {"quantize": quantized}
    heads = {}
    for name, task in recipe.tasks.items():
        if task.head is not None:
            heads[name] = task.head.model_dump(mode="json")
            if task.head.matrix is not None and Path(task.head.matrix).is_file():
                inputs[f"head:{name}"] = file_sha256(Path(task.head.matrix))
    options = {"export": recipe.export.model_dump(mode="json"), "heads": heads}
    return fingerprint("export", options, inputs), inputs


def export(
    recipe: Recipe,
    quantized: Path,
    output: Path,
    *,
    overwrite: bool = False,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the fp32 merged model and every format of the recipe, with settings and heads.

    Raises:
        RecipeError: the output exists, the input is no quantized artifact, or a format cannot
            hold a layer.
        MismatchError: a head does not fit the model, or is that of an expert that was changed.
        NumericsError: a written file does not hold the solver's codes or does not run them in a
            low-bit kernel.
    """
    progress = progress or NoProgress()
    refuse_existing(output, "export", overwrite=overwrite, source=quantized)
    formats_of(recipe.export.formats)
    made = open_output(quantized, "quantize")
    mark, inputs = export_fingerprint(recipe, made.fingerprint)
    merged = quantized / MERGED_FOLDER
    layers, replaced = load_artifact(quantized)
    family = family_of(merged)
    if any(leaves_head_to_expert(task, family) for task in recipe.tasks.values()):
        check_unchanged(open_sources(recipe), made)
    backbone = family.load(merged)
    example = family.example_inputs(merged, 2)
    features = family.embedding_width(backbone, merged)
    heads = build_heads(recipe.tasks, family, merged, features, device=device, progress=progress)
    with atomic_folder(output) as folder:
        place = folder / GRAPHS_FOLDER
        place.mkdir()
        graphs = export_graphs(
            MultiTaskModel(family, backbone, heads),
            example,
            layers,
            replaced,
            recipe.export.formats,
            place,
            opset=recipe.export.opset,
            accuracy_level=recipe.export.accuracy_level,
            two_bit_containers=recipe.export.two_bit_containers,
        )
        copy_settings(merged, folder)
        save_heads(folder, heads)
        details = {
            "graphs": [
                {
                    "format": graph.format,
                    "file": graph.path.relative_to(folder).as_posix(),
                    "bytes": graph.bytes,
                    "opset": graph.opset,
                    "low_bit_nodes": graph.low_bit_nodes,
                    "session_config": session_config(recipe.export.accuracy_level),
                }
                for graph in graphs
            ],
            "codes": {name: layers[name].codes_sha256() for name in sorted(layers)},
        }
        inputs |= model_inputs(made)
        return write_manifest(folder, Manifest("export", mark, recipe, inputs, details=details))
