"""onnxruntime sessions of exported graphs, and the settings they need to run as verified."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from epmq_deploy.cpu import usable_cores
from epmq_deploy.errors import NumericsError
from epmq_deploy.runtime.ort import worker
from epmq_deploy.runtime.ort.worker import Task

# A DequantizeLinear graph cannot carry the accuracy level of the MatMulNBits nodes it becomes;
# without this entry onnxruntime computes them in int8 (level 4).
QDQ_ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"

# The accuracy level of MatMulNBits that rounds activations to int8.
INT8_LEVEL = 4

# Bytes of a graph from which on its session gets a process of its own: beside everything that
# tracing has loaded, it would decide how much memory an export takes.
_LARGE = 2**25


def session_config(accuracy_level: int) -> dict[str, str]:
    """Entries for ``SessionOptions.add_session_config_entry``; harmless for any format."""
    return {QDQ_ACCURACY_LEVEL: str(accuracy_level)}


def run_graph(
    path: Path, accuracy_level: int, batches: Iterable[tuple[Tensor, ...]]
) -> list[dict[str, np.ndarray]]:
    """Return what onnxruntime computes on the processor for each batch, by output, in their order.

    Raises:
        NumericsError: onnxruntime cannot load or run the graph.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "inputs", Path(folder) / "outputs"
        for directory in (inputs, outputs):
            directory.mkdir()
        for index, batch in enumerate(batches):
            np.savez(inputs / f"{index}.npz", *(value.numpy() for value in batch))
        task = Task(
            str(path),
            session_config(accuracy_level),
            None,
            str(inputs),
            str(outputs),
            usable_cores(),
        )
        _work(path, task)
        results = []
        for index in range(len(list(outputs.iterdir()))):
            with np.load(outputs / f"{index}.npz") as stored:
                results.append(dict(stored))
        return results


def write_optimized(path: Path, accuracy_level: int, output: Path) -> None:
    """Have onnxruntime write the graph as it optimizes it for the CPU, large tensors next to it.

    Raises:
        NumericsError: onnxruntime cannot load the graph.
    """
    entries = session_config(accuracy_level) | {
        # Beyond 2 GiB onnxruntime could not write the graph in one file.
        "session.optimized_model_external_initializers_file_name": f"{output.name}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        # Weights laid out for the kernels would be a second copy, and nothing is run here.
        "session.disable_prepacking": "1",
    }
    _work(path, Task(str(path), entries, str(output), None, None, None))


def _work(path: Path, task: Task) -> None:
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    try:
        if size < _LARGE:
            worker.work(task)
        else:
            _work_apart(task)
    # onnxruntime's exceptions share no narrower base class.
    except Exception as error:
        raise NumericsError(f"{path.name} is not a valid ONNX model: {error}") from error


def _work_apart(task: Task) -> None:
    # -P keeps the script's own folder off the path, where modules have names of common use.
    done = subprocess.run(
        [sys.executable, "-P", worker.__file__],
        input=json.dumps(task._asdict()),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip() or f"exit code {done.returncode}")
