"""Latency, size and cost of export of every format, CLIP ViT-B/32 at full size, random weights.

    python benchmarks/deploy.py                   # all figures
    python benchmarks/deploy.py --folder models   # keeps the models, or takes those that are there

All latencies are medians of runs that take turns in one process, two threads, relative to the fp32
graph's. ``onnxruntime int8`` is onnxruntime's ``quantize_dynamic`` of the fp32 graph, of all
operators it supports and of MatMul alone. One row goes through one product of an MLP (768 to 3072)
and through all 24 of a ViT-B, with inputs and outputs bound, in bursts of runs.

Export is ``epmq export`` of every format: its time, and memory relative to the fp32 graph's bytes,
the larger of two runs with the formats in opposite orders. ``memory`` is the peak of the largest
process, the command's or one in which it runs a graph, ``memory_beyond_imports`` less what was
resident after the imports, and ``memory_together`` the largest sum of all processes. Sessions are
created in processes of their own, too. Writes ``benchmarks/results/deploy.json``.
"""

import os

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
import yaml
from command_cost import peak, resident
from onnxruntime.quantization import QuantType, quantize_dynamic
from PIL import Image
from quantize import images, write_models
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil

from epmq_deploy.exporters.formats.base import FormatPlan
from epmq_deploy.exporters.formats.int8_expand import int8_passes
from epmq_deploy.exporters.lowering.layers import DOMAIN, OP_TYPE, add_initializer
from epmq_deploy.exporters.packing.packed_linear import pack_linear
from epmq_deploy.quantization.results import QuantizedLinear

RESULTS = Path(__file__).parent / "results" / "deploy.json"
COMMAND = str(Path(__file__).with_name("command_cost.py"))
FORMATS = ("matmulnbits", "qdq", "int8-expand", "fp16", "fp32")
THREADS = 2
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
SAMPLES = 8
ROW_LAYER = (3072, 768)
GROUP_SIZE = 128
# A ViT-B has 24 of these layers; one alone would stay in the processor's cache in float as well.
DEPTHS = (1, 24)
BURST = 16

MakeNode = Callable[[ir.Graph, str, QuantizedLinear, ir.Value], ir.Node]


def write_recipe(folder: Path) -> Path:
    """Return a ViT-B/32 with random weights, one expert, a few random images and a head."""
    write_models(folder, experts=1)
    CLIPImageProcessorPil().save_pretrained(folder / "base")
    save_file({"head": torch.randn(10, 512)}, folder / "head.safetensors")
    for index, (pixels,) in enumerate(images("task", SAMPLES, 1)):
        place = folder / "images" / f"class{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        shades = pixels[0].sub(pixels.min()).div(pixels.max() - pixels.min()).permute(1, 2, 0)
        Image.fromarray(shades.mul(255).byte().numpy()).save(place / f"{index}.png")
    task = {
        "expert": "expert0",
        "calibration": {"path": "images"},
        "head": {"matrix": "head.safetensors"},
    }
    # The quickest way to 4-bit codes in groups of 128: their values do not matter here.
    quantize = {"method": "gptq", "samples": SAMPLES, "refine": 0, "clip_search": False}
    recipe = folder / "recipe.yaml"
    content = {"base": {"path": "base"}, "tasks": {"task": task}, "quantize": quantize}
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def quantize(folder: Path) -> None:
    """Merge and quantize, unless the folder has that already."""
    if not (folder / "quantized").is_dir():
        recipe = write_recipe(folder)
        _apart(COMMAND, "merge", str(recipe), "-o", str(folder / "merged"), "-q")
        quantized = str(folder / "quantized")
        _apart(COMMAND, "quantize", str(folder / "merged"), "-o", quantized, "-q")


def export(folder: Path, level: int, formats: Sequence[str]) -> dict[str, Any]:
    """``epmq export`` once: what it cost and wrote."""
    output = folder / f"level{level}"
    chosen = [argument for name in formats for argument in ("--formats", name)]
    options = ["-o", str(output), "--accuracy-level", str(level), "--overwrite", "-q", *chosen]
    cost = _apart(COMMAND, "export", str(folder / "quantized"), *options)
    graphs = json.loads((output / "manifest.json").read_text())["details"]["graphs"]
    return cost | {
        "files": {graph["format"]: output / graph["file"] for graph in graphs},
        "int8_layers": {
            graph["format"]: sum(layer["kernel"] == "int8" for layer in graph["layers"].values())
            for graph in graphs
            if graph["layers"]
        },
    }


def quantize_by_onnxruntime(fp32: Path, output: Path, operators: list[str] | None) -> None:
    """Have onnxruntime make its own int8 form of a float graph."""
    model = onnx.load(str(fp32))
    # Its shape inference trips over shapes that are there already.
    del model.graph.value_info[:]
    plain = output.with_suffix(".plain.onnx")
    onnx.save(model, str(plain))
    quantize_dynamic(
        str(plain), str(output), op_types_to_quantize=operators, weight_type=QuantType.QInt8
    )
    plain.unlink()


def session(file: Path | bytes, level: int = 0) -> onnxruntime.InferenceSession:
    """Return a session on two threads that leaves the cores alone while others run."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def latencies(
    sessions: Mapping[str, onnxruntime.InferenceSession], feed: dict[str, Any], runs: int
) -> dict[str, float]:
    """Median seconds of each, measured interleaved."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(runs + 3):
        for name, one in sessions.items():
            started = time.perf_counter()
            one.run(None, feed)
            if turn >= 3:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def one_row(depth: int, turns: int) -> dict[str, float]:
    """Latency of layers in a row at one row of input, relative to float MatMul."""
    torch.manual_seed(0)
    shapes = [ROW_LAYER if index % 2 == 0 else ROW_LAYER[::-1] for index in range(depth)]
    layers = {f"layers.{index}": _random_layer(*shape) for index, shape in enumerate(shapes)}
    graphs = {"fp32": _chain(layers, _float_node)}
    for level in (0, 4):
        packed = partial(_packed_node, level=level)
        graphs[f"matmulnbits level {level}"] = _chain(layers, packed)
    graphs["int8-expand"] = _chain(layers, partial(_packed_node, level=0))
    FormatPlan(int8_passes({})).lower(graphs["int8-expand"])
    sessions = {
        name: session(ir.to_proto(graph).SerializeToString()) for name, graph in graphs.items()
    }
    found = _bursts(sessions, np.ones((1, ROW_LAYER[1]), np.float32), turns)
    ratios = {name: value / found["fp32"] for name, value in found.items()}
    return ratios | {"fp32 microseconds a layer": 1e6 * found["fp32"] / depth}


def _bursts(
    sessions: Mapping[str, onnxruntime.InferenceSession], row: np.ndarray, turns: int
) -> dict[str, float]:
    """Median seconds of a run among several in a row, graphs interleaved."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(turns + 1):
        for name, one in sessions.items():
            bound = one.io_binding()
            bound.bind_cpu_input("x", row)
            bound.bind_output("y")
            for _ in range(BURST):
                started = time.perf_counter()
                one.run_with_iobinding(bound)
                if turn:
                    times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def _random_layer(rows: int, columns: int) -> QuantizedLinear:
    """4 bits, symmetric, groups of 128."""
    groups = columns // GROUP_SIZE
    return QuantizedLinear(
        torch.randint(0, 16, (rows, columns), dtype=torch.uint8),
        # Layer after layer, values stay within float32.
        (torch.rand(rows, groups) + 0.5) / columns,
        torch.full((rows, groups), 8, dtype=torch.uint8),
        4,
        GROUP_SIZE,
        True,
    )


def _chain(layers: Mapping[str, QuantizedLinear], make: MakeNode) -> ir.Model:
    """One layer after the other."""
    float32 = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=float32, shape=ir.Shape(["rows", ROW_LAYER[1]]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21, DOMAIN: 1}, name="layers")
    value = x
    for name, layer in layers.items():
        node = make(graph, name, layer, value)
        graph.append(node)
        value = node.outputs[0]
        value.name = f"{name}.output"
    value.name, value.type = "y", float32
    graph.outputs.append(value)
    return ir.Model(graph, ir_version=10)


def _float_node(graph: ir.Graph, name: str, layer: QuantizedLinear, x: ir.Value) -> ir.Node:
    weight = ir.Tensor(layer.dequantize().numpy().T.copy(), name=f"{name}.weight")
    return ir.node("MatMul", [x, add_initializer(graph, weight)], name=name)


def _packed_node(
    graph: ir.Graph, name: str, layer: QuantizedLinear, x: ir.Value, level: int
) -> ir.Node:
    packed = pack_linear(name, layer)
    tensors = [
        ir.Tensor(packed.codes, name=f"{name}.codes"),
        ir.Tensor(packed.scales, name=f"{name}.scales"),
    ]
    attributes = {
        "K": layer.in_features,
        "N": layer.out_features,
        "bits": packed.bits,
        "block_size": packed.block_size,
        "accuracy_level": level,
    }
    inputs = [x, *(add_initializer(graph, tensor) for tensor in tensors)]
    return ir.node(OP_TYPE, inputs, attributes, domain=DOMAIN, name=name)


def _apart(*command: str) -> dict[str, Any]:
    """Run a script in a process of its own and read what it prints."""
    done = subprocess.run(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True, env=ENVIRONMENT
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _session_cost(file: Path) -> dict[str, float]:
    """Return what creating a session takes: seconds, and bytes of memory beyond the imports."""
    before = resident()
    started = time.perf_counter()
    session(file)
    return {"seconds": time.perf_counter() - started, "bytes": peak() - before}


def measure(folder: Path, runs: int) -> dict[str, Any]:
    """Everything, from random weights on."""
    load = os.getloadavg()[0]
    quantize(folder)
    exported = export(folder, 0, FORMATS)
    other = export(folder, 4, FORMATS[::-1])
    files = {name: file for name, file in exported["files"].items() if name != "fp16"}
    files["matmulnbits level 4"] = other["files"]["matmulnbits"]
    for name, operators in (("all", None), ("MatMul", ["MatMul"])):
        files[f"onnxruntime int8, {name}"] = folder / f"onnxruntime_{name}.onnx"
        quantize_by_onnxruntime(files["fp32"], files[f"onnxruntime int8, {name}"], operators)
    fp32 = files["fp32"].stat().st_size
    report: dict[str, Any] = {
        "threads": THREADS,
        "processor": _processor(),
        "load": {"start": load},
        "export": {
            "seconds": exported["seconds"],
            "memory": max(run["bytes"] for run in (exported, other)) / fp32,
            "memory_beyond_imports": max(run["bytes"] - run["imports"] for run in (exported, other))
            / fp32,
            "memory_together": max(run["together"] for run in (exported, other)) / fp32,
        },
        "int8_layers": exported["int8_layers"],
        "size": {name: file.stat().st_size / fp32 for name, file in files.items()},
        "session": {},
        "latency": {},
    }
    for name, file in files.items():
        made = _apart(__file__, "--session", str(file))
        report["session"][name] = {"seconds": made["seconds"], "memory": made["bytes"] / fp32}
    sessions = {name: session(file) for name, file in files.items()}
    for batch in (1, 8):
        feed = {"pixel_values": next(iter(images("timed", batch, batch)))[0].numpy()}
        found = latencies(sessions, feed, max(runs // batch, 20))
        report["latency"][f"batch {batch}"] = {
            name: value / found["fp32"] for name, value in found.items()
        }
        report["latency"][f"batch {batch}, fp32 milliseconds"] = 1000 * found["fp32"]
    del sessions
    report["one_row"] = {
        f"layers: {depth}": one_row(depth, max(runs // depth, 10)) for depth in DEPTHS
    }
    report["load"]["end"] = os.getloadavg()[0]
    return report


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split()
    known = [flag for flag in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8") if flag in flags]
    return " ".join(known)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="for the models; temporary when absent")
    parser.add_argument("--runs", type=int, default=40, help="timed runs at batch 1")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--session", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    if arguments.session:
        print(json.dumps(_session_cost(arguments.session)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = measure(folder, arguments.runs)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
