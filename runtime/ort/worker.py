"""Create a session of a graph and run it, in this or a separate process.

As a script it reads its task as JSON from stdin. It imports nothing but numpy and onnxruntime, so
that such a process holds little else than the graph.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime

_ERRORS_ONLY = 3


class Task(NamedTuple):
    """What to do with a graph; plain data.

    Attributes:
        graph: the file.
        entries: of the session's configuration.
        optimized: where to write what onnxruntime makes of the graph.
        inputs: folder of ``<batch>.npz``, arrays in the order of the graph's inputs.
        outputs: folder for the same of the graph's outputs, by name.
        threads: intra-op threads; onnxruntime's default when absent.
    """

    graph: str
    entries: dict[str, str]
    optimized: str | None
    inputs: str | None
    outputs: str | None
    threads: int | None


def work(task: Task) -> None:
    """Do it, on the processor."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    for key, value in task.entries.items():
        options.add_session_config_entry(key, value)
    if task.threads is not None:
        options.intra_op_num_threads = task.threads
    if task.optimized is not None:
        options.optimized_model_filepath = task.optimized
        options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(task.graph, options, providers=["CPUExecutionProvider"])
    if task.inputs is None or task.outputs is None:
        return
    names = [item.name for item in session.get_inputs()]
    outputs = [item.name for item in session.get_outputs()]
    for file in Path(task.inputs).iterdir():
        with np.load(file) as stored:
            arrays = [stored[key] for key in stored.files]
        results = session.run(outputs, dict(zip(names, arrays, strict=True)))
        np.savez(Path(task.outputs) / file.name, **dict(zip(outputs, results, strict=True)))


if __name__ == "__main__":
    try:
        work(Task(**json.load(sys.stdin)))
    # onnxruntime's exceptions share no narrower base class.
    except Exception as error:
        sys.exit(str(error))
