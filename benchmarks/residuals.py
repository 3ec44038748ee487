"""Accuracy against size of one model with corrections for every task, by their rank.

    python benchmarks/residuals.py                    # the bundled zoo, test samples
    python benchmarks/residuals.py --limit 256        # of each task's test samples, the first 256

Every rank is quantized, exported as matmulnbits and scored in onnxruntime. Next to it: each expert
in a 4-bit model of its own, which takes as many files as there are tasks. Writes
``benchmarks/results/residuals.json`` and prints the table as Markdown.
"""

import os

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from methods import RESULTS, ZOO, Suite, load_suite

from epmq_deploy.artifacts.manifest import GraphEntry
from epmq_deploy.exporters.stage import export
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.sequential import quantize_model
from epmq_deploy.quantization.stage import quantize
from epmq_deploy.recipe import load_recipe, override
from epmq_deploy.runtime.ort.sessions import Graph

RANKS = (0, 1, 2, 4, 7, 8, 16)
FORMAT = "matmulnbits"


def accuracies(suite: Suite, folder: Path, entry: GraphEntry) -> dict[str, float]:
    """Percent correct of a graph by task, each sample with its own task's corrections."""
    graph = Graph.exported(folder, entry, provider="cpu", threads=1)
    scores = {}
    for task, (batches, labels) in suite.scored.items():
        output = f"logits_{task}"
        predicted = [
            torch.from_numpy(graph.run(batch, [output], task=task)[output]).argmax(1)
            for batch in batches
        ]
        scores[task] = 100.0 * float((torch.cat(predicted) == labels).float().mean())
    return scores


def exported_with(suite: Suite, rank: int, work: Path) -> dict[str, Any]:
    """Quantize with corrections of a rank, export and score."""
    recipe = override(suite.recipe, "quantize", {"residual_rank": rank})
    recipe = override(recipe, "export", {"formats": [FORMAT]})
    manifest = quantize(recipe, suite.folder, work / f"quantized-{rank}")
    graphs = export(recipe, work / f"quantized-{rank}", work / f"exported-{rank}").graphs
    (entry,) = (graph for graph in graphs if graph.format == FORMAT)
    scores = accuracies(suite, work / f"exported-{rank}", entry)
    residuals = manifest.details.residuals
    return {
        "model": f"rank {rank}",
        "average": sum(scores.values()) / len(scores),
        "bytes": entry.bytes,
        "corrections": 0 if residuals is None else residuals.bytes,
        "tasks": scores,
    }


def separate_experts(suite: Suite, bytes_of_one: int) -> dict[str, Any]:
    """Quantize every expert by itself, on its own samples, in a file of the shared one's size."""
    experts = ExpertBackbone(open_sources(suite.recipe), torch.device("cpu"))
    method = QUANTIZATION_METHODS["gptq"]
    options = override(suite.recipe, "quantize", {"method": "gptq"}).quantize
    scores = {}
    for task, inputs in suite.calibration.items():
        model = suite.family.load(suite.folder)
        model.load_state_dict(experts.become(task).state_dict())
        quantize_model(
            model, suite.family, method, options, batches={task: lambda inputs=inputs: inputs}
        )
        scores[task] = suite.accuracy(model, task)
    return {
        "model": f"{len(scores)} separate experts",
        "average": sum(scores.values()) / len(scores),
        "bytes": bytes_of_one * len(scores),
        "corrections": 0,
        "tasks": scores,
    }


def main() -> None:
    """Measure the frontier and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=ZOO)
    parser.add_argument("--name", default="zoo")
    parser.add_argument("--limit", type=int, help="test samples of a task; default: all")
    parser.add_argument("--rank", type=int, action="append", help=f"default: {RANKS}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        suite = load_suite(
            load_recipe(arguments.recipe), work / "merged", False, limit=arguments.limit
        )
        experts = suite.experts_average()
        print(f"experts: {experts:.2f}\n", flush=True)
        print("| model | average accuracy % | of the experts' % | MB | times rank 0 |")
        print("|---|---|---|---|---|")
        rows: list[dict[str, Any]] = []
        ranks = arguments.rank or RANKS
        for rank in (0, *(rank for rank in ranks if rank)):
            rows.append(exported_with(suite, rank, work))
            say(rows[-1], experts, rows[0]["bytes"])
        rows.append(separate_experts(suite, rows[0]["bytes"]))
        say(rows[-1], experts, rows[0]["bytes"])
    output = arguments.results / "residuals.json"
    known = json.loads(output.read_text()) if output.is_file() else {}
    known[arguments.name] = {
        "limit": arguments.limit,
        "samples": suite.recipe.quantize.model_dump().get("samples"),
        "experts": experts,
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(known, indent=2) + "\n")


def say(row: dict[str, Any], experts: float, size: int) -> None:
    """Print a row of the table."""
    share, times = 100 * row["average"] / experts, row["bytes"] / size
    print(
        f"| {row['model']} | {row['average']:.2f} | {share:.1f} | {row['bytes'] / 1e6:.2f} "
        f"| {times:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
