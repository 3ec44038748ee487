"""Accuracy of every format in onnxruntime, against the same model in torch, on test samples.

    python benchmarks/text_suite.py build    # once, for the second suite
    python benchmarks/formats.py             # the bundled zoo and the text suite
    python benchmarks/formats.py --suite zoo

Quantizes with the default and exports in every way there is: low-bit formats are compared with what
the solver left in torch, float formats with the merged model. Both see the same batches, two
threads. Writes ``benchmarks/results/formats.json`` and prints it as Markdown.
"""

import os

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import RESULTS, ZOO, Suite, load_suite
from text_suite import CACHE
from torch import nn

from epmq_deploy.data.accuracy import embeddings
from epmq_deploy.exporters.formats import format_names, low_bit_format_names
from epmq_deploy.exporters.stage import export
from epmq_deploy.quantization.artifact import load_artifact
from epmq_deploy.quantization.sequential import apply_quantized
from epmq_deploy.quantization.stage import quantize
from epmq_deploy.recipe import Recipe, load_recipe, override
from epmq_deploy.runtime.ort.sessions import Graph

THREADS = 2
SUITES = {"zoo": ZOO, "text": CACHE / "recipe.yaml"}
# Largest distance from torch, in points of average accuracy.
BAR = 0.3

Logits = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Way:
    """One export: what is added to the names of its formats, and its options."""

    addition: str
    options: dict[str, Any]


EVERY_FORMAT = Way("", {"formats": list(format_names())})
LEVEL_4 = Way(" at level 4", {"formats": ["matmulnbits"], "accuracy_level": 4})
STATIC = Way(" with static ranges", {"formats": ["int8-expand"], "int8_activations": "static"})
TWO_BITS = {"formats": ["matmulnbits"], "two_bit_containers": True}
# By bits of the codes.
WAYS = {
    4: (EVERY_FORMAT, LEVEL_4, STATIC),
    2: (
        Way("", {"formats": list(low_bit_format_names())}),
        Way(" in 2 bits", TWO_BITS),
        Way(" in 2 bits at level 4", TWO_BITS | {"accuracy_level": 4}),
    ),
}


def torch_logits(suite: Suite, model: nn.Module) -> Logits:
    """``[n, C]`` by task."""
    return {
        task: np.concatenate(
            [suite.heads[task](embeddings(model, suite.family, batch)).numpy() for batch in batches]
        )
        for task, (batches, _) in suite.scored.items()
    }


def graph_logits(suite: Suite, graph: Graph) -> Logits:
    """``[n, C]`` by task."""
    found = {}
    for task, (batches, _) in suite.scored.items():
        output = f"logits_{task}"
        found[task] = np.concatenate([graph.run(batch, [output])[output] for batch in batches])
    return found


def percent_correct(suite: Suite, logits: Logits) -> dict[str, float]:
    """By task, and their average."""
    tasks = {
        task: 100 * float((logits[task].argmax(axis=1) == labels.numpy()).mean())
        for task, (_, labels) in suite.scored.items()
    }
    return {"average": sum(tasks.values()) / len(tasks), **tasks}


def compared(suite: Suite, logits: Logits, reference: Logits) -> dict[str, Any]:
    """Accuracy, points above torch, and percent of samples with the same prediction."""
    accuracy = percent_correct(suite, logits)
    same = [(logits[task].argmax(1) == reference[task].argmax(1)).mean() for task in suite.scored]
    points = accuracy["average"] - percent_correct(suite, reference)["average"]
    return {"accuracy": accuracy, "points": points, "agreement": 100 * float(np.mean(same))}


def exported_logits(
    suite: Suite, recipe: Recipe, quantized: Path, work: Path, way: Way
) -> Iterator[tuple[str, str, Logits]]:
    """Name of a format, how it was exported, logits of its graph."""
    folder = work / f"exported{way.addition.replace(' ', '_')}"
    made = export(override(recipe, "export", way.options), quantized, folder)
    for entry in made.graphs:
        # The fp32 graph is always written.
        if entry.format in way.options["formats"]:
            graph = Graph.exported(folder, entry, provider="cpu", threads=THREADS)
            yield entry.format, entry.format + way.addition, graph_logits(suite, graph)


def measure(suite: Suite, bits: int, work: Path) -> dict[str, Any]:
    """Everything at one width."""
    recipe = override(suite.recipe, "quantize", {"bits": bits})
    quantized = work / "quantized"
    quantize(recipe, suite.folder, quantized)
    model = suite.family.load(suite.folder)
    merged = torch_logits(suite, model)
    apply_quantized(model, *load_artifact(quantized))
    solved = torch_logits(suite, model)
    rows, logits, low_bit = {}, {}, low_bit_format_names()
    for way in WAYS[bits]:
        for format_, name, found in exported_logits(suite, recipe, quantized, work, way):
            logits[name] = found
            rows[name] = compared(suite, found, solved if format_ in low_bit else merged)
            print(f"{bits} bits, {name}: {rows[name]['points']:+.3f}", flush=True)
    return {
        "torch": {
            "merged": percent_correct(suite, merged),
            "quantized": percent_correct(suite, solved),
        },
        "formats": rows,
        "qdq_equals_matmulnbits_bit_by_bit": all(
            np.array_equal(logits["matmulnbits"][task], logits["qdq"][task])
            for task in suite.scored
        ),
        "all_within_bar": all(abs(row["points"]) <= BAR for row in rows.values()),
    }


def table(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = ["| suite | bits | model | average | against torch | agrees, % |"]
    lines += ["|---|--:|---|--:|--:|--:|"]
    for name, widths in report.items():
        for bits, found in widths.items():
            start = f"| {name} | {bits} |"
            for model, accuracy in found["torch"].items():
                lines.append(f"{start} {model}, torch | {accuracy['average']:.2f} | | |")
            for model, row in found["formats"].items():
                average = row["accuracy"]["average"]
                cells = f"{average:.2f} | {row['points']:+.2f} | {row['agreement']:.2f}"
                lines.append(f"{start} {model} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and write the results, suite by suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", action="append", choices=SUITES, help="all when absent")
    parser.add_argument("--output", type=Path, default=RESULTS / "formats.json")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    file = arguments.output
    report = json.loads(file.read_text()) if file.is_file() else {}
    for name in arguments.suite or SUITES:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            suite = load_suite(load_recipe(SUITES[name]), work / "merged", held_back=False)
            report[name] = {}
            for bits in WAYS:
                place = work / str(bits)
                place.mkdir()
                report[name][str(bits)] = measure(suite, bits, place)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
