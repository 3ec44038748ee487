"""Measure load time and memory of sessions, in a separate process.

Run as a script: it imports nothing but numpy and onnxruntime, so that what the process holds is
theirs; text generation is loaded from its file, outside of the package. Reads its task as JSON
from stdin and writes its results as JSON to stdout.
"""

import json
import runpy
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

_GENERATION = Path(__file__).with_name("generation.py")
_STATUS = Path("/proc/self/status")


def peak_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not say.

    Not ``getrusage``: its figure survives ``exec``, so that of a large parent would be reported.
    """
    if not _STATUS.is_file():
        return None
    line = next(
        text
        for text in _STATUS.read_text(encoding="utf-8").splitlines()
        if text.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


class _Graph:
    """A session as ``generation.py`` takes it."""

    provider = ""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.input_shapes = {item.name: tuple(item.shape) for item in session.get_inputs()}

    def compute(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        names = [item.name for item in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(feed)), strict=True))


def _run(sessions: list[ort.InferenceSession], arrays: list[Any]) -> None:
    """Run the only graph."""
    names = [item.name for item in sessions[0].get_inputs()]
    sessions[0].run(None, dict(zip(names, arrays, strict=True)))


def _writing(special: Mapping[str, Any]) -> Callable[[list[ort.InferenceSession], list[Any]], None]:
    """Return a function that generates an answer with all graphs."""
    text_generator = runpy.run_path(str(_GENERATION))["text_generator"]

    def write(sessions: list[ort.InferenceSession], arrays: list[Any]) -> None:
        ids, mask, length = arrays
        graphs = [_Graph(session) for session in sessions]
        text_generator(graphs, SimpleNamespace(**special), int(length)).write(
            ids, mask, int(length)
        )

    return write


def main() -> None:
    """Create the sessions and run one sample."""
    task = json.load(sys.stdin)
    with np.load(task["inputs"]) as stored:
        arrays = [stored[name] for name in stored.files]
    special = task["special_tokens"]
    run = _run if special is None else _writing(special)
    before = peak_bytes()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if task["threads"] is not None:
        options.intra_op_num_threads = task["threads"]
    for key, value in task["session_config"].items():
        options.add_session_config_entry(key, value)
    started = time.perf_counter()
    sessions = [
        ort.InferenceSession(file, options, providers=[task["provider"]]) for file in task["files"]
    ]
    seconds = time.perf_counter() - started
    run(sessions, arrays)
    after = peak_bytes()
    memory = None if before is None or after is None else after - before
    json.dump({"load_ms": 1000 * seconds, "peak_bytes": memory}, sys.stdout)


if __name__ == "__main__":
    main()
