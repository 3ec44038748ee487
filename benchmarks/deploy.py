"""Latency, size and cost of export of every format, CLIP ViT-B/32 at full size, random weights.

    python benchmarks/deploy.py

All latencies are medians of runs that take turns in one process, two threads, relative to the fp32
graph's. Export runs in a process of its own: its time, and its peak resident memory beyond what was
resident after the imports, relative to the fp32 graph's bytes. Creating a session likewise.
``onnxruntime int8`` is onnxruntime's ``quantize_dynamic`` of the fp32 graph, of all operators it
supports and of MatMul alone. Writes ``benchmarks/results/deploy.json``.
"""

import os

# Read when torch is imported; see epmq_deploy.cli.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from quantize import images, write_models

from epmq_deploy.calibration.targets import TARGETS
from epmq_deploy.calibration.targets.gptq import GptqOptions
from epmq_deploy.exporters import export_graphs, format_names
from epmq_deploy.exporters.formats import formats_of
from epmq_deploy.exporters.formats.format import ExportContext
from epmq_deploy.exporters.graph import DOMAIN, OP_TYPE
from epmq_deploy.exporters.packed_linear import pack_linear
from epmq_deploy.models import MultiTaskModel, TaskHead, family_of
from epmq_deploy.quantization.artifact import load_artifact, load_inputs, save_artifact
from epmq_deploy.quantization.model import quantize_model
from epmq_deploy.quantization.quantized_linear import QuantizedLinear
from epmq_deploy.recipe import ExportOptions

RESULTS = Path(__file__).parent / "results" / "deploy.json"
THREADS = 2
SAMPLES = 8
ROW_LAYER = (3072, 768)


def quantize(base: Path, output: Path) -> None:
    """4-bit codes by GPTQ, groups of 128, with statistics of a few random images."""
    family = family_of(base)
    options = GptqOptions(samples=SAMPLES, refine=0, clip_search=False)
    batches = {"task": lambda: images("task", SAMPLES, SAMPLES)}
    model = family.load(base)
    result = quantize_model(model, family, TARGETS["gptq"], options, batches=batches)
    output.mkdir()
    save_artifact(output, result)


def export(base: Path, codes: Path, output: Path, level: int, formats: list[str]) -> dict[str, Any]:
    """Export once; seconds, and bytes of memory beyond the imports."""
    resident = _resident()
    started = time.perf_counter()
    family = family_of(base)
    backbone = family.load(base)
    layers, replaced = load_artifact(codes)
    groups = tuple(group for block in family.blocks(backbone) for group in block.groups)
    width = family.embedding_width(backbone, base)
    output.mkdir()
    graphs = export_graphs(
        MultiTaskModel(family, backbone, {"task": TaskHead(torch.randn(10, width))}),
        family.example_inputs(base, 2),
        layers,
        replaced,
        formats,
        output,
        accuracy_level=level,
        context=ExportContext(ExportOptions(), load_inputs(codes), groups),
    )
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "bytes": _peak() - resident,
        "files": {graph.format: str(graph.path) for graph in graphs},
        "int8_layers": {
            graph.format: sum(layer["kernel"] == "int8" for layer in graph.layers.values())
            for graph in graphs
            if graph.layers
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
    """A session on two threads that leaves the cores alone while others run."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def latencies(
    sessions: Mapping[str, onnxruntime.InferenceSession], feed: dict[str, Any], runs: int
) -> dict[str, float]:
    """Median seconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(runs + 3):
        for name, one in sessions.items():
            started = time.perf_counter()
            one.run(None, feed)
            if turn >= 3:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def one_row(runs: int) -> dict[str, float]:
    """Latency of one layer at one row, relative to a float MatMul."""
    rows, columns = ROW_LAYER
    torch.manual_seed(0)
    groups = columns // 128
    layer = QuantizedLinear(
        torch.randint(0, 16, (rows, columns), dtype=torch.uint8),
        torch.rand(rows, groups) + 0.5,
        torch.full((rows, groups), 8, dtype=torch.uint8),
        4,
        128,
        True,
    )
    graphs = {"fp32": _float_layer(layer)}
    for level in (0, 4):
        graphs[f"matmulnbits level {level}"] = _packed_layer(layer, level)
    graphs["int8-expand"] = _packed_layer(layer, 0)
    formats_of(["int8-expand"])[0].lower(graphs["int8-expand"])
    sessions = {
        name: session(ir.to_proto(graph).SerializeToString()) for name, graph in graphs.items()
    }
    found = latencies(sessions, {"x": np.ones((1, columns), np.float32)}, runs)
    return {name: value / found["fp32"] for name, value in found.items()}


def _float_layer(layer: QuantizedLinear) -> ir.Model:
    weight = ir.Tensor(layer.dequantize().numpy().T.copy(), name="weight")
    return _graph(layer, lambda x, add: ir.node("MatMul", [x, add(weight)]), [weight])


def _packed_layer(layer: QuantizedLinear, level: int) -> ir.Model:
    packed = pack_linear("layer", layer)
    tensors = [
        ir.Tensor(packed.codes, name="layer.codes"),
        ir.Tensor(packed.scales, name="layer.scales"),
    ]
    attributes = {
        "K": layer.in_features,
        "N": layer.out_features,
        "bits": packed.bits,
        "block_size": packed.block_size,
        "accuracy_level": level,
    }

    def make(x: ir.Value, add: Any) -> ir.Node:
        inputs = [x, *(add(tensor) for tensor in tensors)]
        return ir.node(OP_TYPE, inputs, attributes, domain=DOMAIN, name="layer")

    return _graph(layer, make, tensors)


def _graph(layer: QuantizedLinear, make: Any, tensors: list[ir.Tensor]) -> ir.Model:
    float32 = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=float32, shape=ir.Shape(["rows", layer.in_features]))
    values = {
        tensor.name: ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=tensor.shape,
            const_value=tensor,
        )
        for tensor in tensors
    }
    node = make(x, lambda tensor: values[tensor.name])
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", float32, ir.Shape(["rows", layer.out_features])
    graph = ir.Graph(
        [x],
        [y],
        nodes=[node],
        initializers=list(values.values()),
        opset_imports={"": 21, DOMAIN: 1},
        name="layer",
    )
    return ir.Model(graph, ir_version=10)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _apart(*arguments: str) -> dict[str, Any]:
    """Run one step in a process of its own and read what it prints."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _step(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = arguments.folder
    if arguments.step == "session":
        resident = _resident()
        started = time.perf_counter()
        session(Path(arguments.file))
        return {"seconds": time.perf_counter() - started, "bytes": _peak() - resident}
    level = arguments.level
    formats = [name for name in format_names() if name not in ("fp16", "fp32")]
    chosen = formats if level == 0 else ["matmulnbits"]
    return export(folder / "base", folder / "codes", folder / f"level{level}", level, chosen)


def measure(folder: Path, runs: int) -> dict[str, Any]:
    """Everything, from random weights on."""
    if not (folder / "base").is_dir():
        write_models(folder)
    if not (folder / "codes").is_dir():
        quantize(folder / "base", folder / "codes")
    exported = _apart("--step", "export", "--folder", str(folder))
    other = _apart("--step", "export", "--folder", str(folder), "--level", "4")
    files = {name: Path(file) for name, file in exported["files"].items()}
    files["matmulnbits level 4"] = Path(other["files"]["matmulnbits"])
    for name, operators in (("all", None), ("MatMul", ["MatMul"])):
        files[f"onnxruntime int8, {name}"] = folder / f"onnxruntime_{name}.onnx"
        quantize_by_onnxruntime(files["fp32"], files[f"onnxruntime int8, {name}"], operators)
    fp32 = files["fp32"].stat().st_size
    report: dict[str, Any] = {
        "threads": THREADS,
        "processor": _processor(),
        "export": {"seconds": exported["seconds"], "memory": exported["bytes"] / fp32},
        "int8_layers": exported["int8_layers"],
        "size": {name: file.stat().st_size / fp32 for name, file in files.items()},
        "session": {},
        "latency": {},
    }
    for name, file in files.items():
        made = _apart("--step", "session", "--file", str(file))
        report["session"][name] = {"seconds": made["seconds"], "memory": made["bytes"] / fp32}
    sessions = {name: session(file) for name, file in files.items()}
    for batch in (1, 8):
        feed = {"pixel_values": next(iter(images("timed", batch, batch)))[0].numpy()}
        found = latencies(sessions, feed, max(runs // batch, 10))
        report["latency"][f"batch {batch}"] = {
            name: value / found["fp32"] for name, value in found.items()
        }
        report["latency"][f"batch {batch}, fp32 milliseconds"] = 1000 * found["fp32"]
    report["one_row"] = one_row(50 * runs)
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
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--level", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    if arguments.step:
        print(json.dumps(_step(arguments)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        report = measure(arguments.folder or Path(temporary), arguments.runs)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
