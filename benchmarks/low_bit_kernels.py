"""onnxruntime's low-bit kernels behind two choices of the export, side by side on this machine.

- 2-bit codes in containers of 2 bits or of 4 (`epmq_deploy.exporters.lowering.two_bits`);
- rows of an INT8 table: Gather, Cast, Mul, as they are exported
  (`epmq_deploy.exporters.lowering.int8.rows`), or ``com.microsoft::GatherBlockQuantized``.

Writes ``results/low_bit_kernels.json``: median milliseconds, variants interleaved.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from epmq_deploy.exporters.packing.bit_packing import pack_codes, pack_zero_points

RESULTS = Path(__file__).parent / "results" / "low_bit_kernels.json"
CONTRIB = "com.microsoft"
LAYER, BLOCK = (768, 3072), 64
TABLE, TABLE_BLOCK = (30522, 384), 128


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=60)
    options = parser.parse_args()
    found = {
        "onnxruntime": ort.__version__,
        "threads": options.threads,
        "two_bits": two_bits(options.threads, options.runs),
        "embeddings": embeddings(options.threads, options.runs),
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def two_bits(threads: int, runs: int) -> list[dict[str, float]]:
    """One layer with 2-bit codes, asymmetric."""
    rng = np.random.default_rng(0)
    (inputs, outputs), blocks = LAYER, LAYER[0] // BLOCK
    codes = rng.integers(0, 4, (outputs, inputs), dtype=np.uint8)
    scales = rng.random((outputs, blocks), dtype=np.float32)
    zeros = rng.integers(0, 4, (outputs, blocks), dtype=np.uint8)
    found = []
    for level in (0, 4):
        sessions = {}
        for bits in (2, 4):
            attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": BLOCK}
            node = helper.make_node(
                "MatMulNBits",
                ["x", "codes", "scales", "zeros"],
                ["y"],
                domain=CONTRIB,
                accuracy_level=level,
                **attributes,
            )
            arrays = {
                "codes": pack_codes(codes, bits, BLOCK),
                "scales": scales,
                "zeros": pack_zero_points(zeros, bits),
            }
            sessions[f"container_{bits}"] = session([node], arrays, TensorProto.FLOAT, threads)
        for rows in (1, 50):
            x = rng.standard_normal((rows, inputs)).astype(np.float32)
            found.append({"level": level, "rows": rows} | medians(sessions, x, runs))
    return found


def embeddings(threads: int, runs: int) -> list[dict[str, float]]:
    """Return a table of MiniLM's size; GatherBlockQuantized needs a scale for every block."""
    rng = np.random.default_rng(0)
    rows, width = TABLE
    codes = rng.integers(0, 256, TABLE, dtype=np.uint8)
    scales = rng.random((rows, 1), dtype=np.float32)
    blocks = width // TABLE_BLOCK
    gather = [
        helper.make_node("Gather", ["codes", "x"], ["c"]),
        helper.make_node("Gather", ["scales", "x"], ["s"]),
        helper.make_node("Cast", ["c"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "s"], ["y"]),
    ]
    quantized = helper.make_node(
        "GatherBlockQuantized",
        ["codes", "x", "scales", "zeros"],
        ["y"],
        domain=CONTRIB,
        bits=8,
        block_size=TABLE_BLOCK,
        gather_axis=0,
        quantize_axis=1,
    )
    signed = (codes.astype(np.int16) - 128).astype(np.int8)
    plain = {"codes": signed, "scales": scales}
    blocked = {
        "codes": codes,
        "scales": np.repeat(scales, blocks, axis=1),
        "zeros": np.full((rows, blocks), 128, np.uint8),
    }
    sessions = {
        "gather_cast_mul": session(gather, plain, TensorProto.INT64, threads),
        "gather_block_quantized": session([quantized], blocked, TensorProto.INT64, threads),
    }
    found = []
    for ids in (32, 1024):
        x = rng.integers(0, rows, (1, ids), dtype=np.int64)
        one, other = (each.run(None, {"x": x})[0] for each in sessions.values())
        found.append(
            {"ids": ids, "equal": bool(np.array_equal(one, other))} | medians(sessions, x, runs)
        )
    sizes = [sum(array.nbytes for array in arrays.values()) for arrays in (plain, blocked)]
    return [*found, {"bytes_" + name: size for name, size in zip(sessions, sizes, strict=True)}]


def session(
    nodes: Sequence[NodeProto], arrays: Mapping[str, np.ndarray], dtype: int, threads: int
) -> ort.InferenceSession:
    """Return a graph of one input ``x`` and one output ``y``."""
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", dtype, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    model: ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def medians(
    sessions: Mapping[str, ort.InferenceSession], x: np.ndarray, runs: int
) -> dict[str, float]:
    """Milliseconds by name, measured interleaved."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(runs + 5):
        for name, each in sessions.items():
            started = time.perf_counter()
            each.run(None, {"x": x})
            times[name].append((time.perf_counter() - started) * 1000)
    return {name: round(float(np.median(values[5:])), 4) for name, values in times.items()}


if __name__ == "__main__":
    main()
