"""What creating and running sessions costs, in a process of its own.

Run as a script: it imports nothing but numpy and onnxruntime, so that what the process holds is
theirs. Reads its task as JSON from stdin, writes its findings as JSON to stdout.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

_STATUS = Path("/proc/self/status")


def peak_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not say.

    Not ``getrusage``: its figure survives ``exec``, so that of a large parent would be reported.
    """
    if not _STATUS.is_file():
        return None
    line = next(text for text in _STATUS.read_text().splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Create the sessions and run the first of them once, where there are inputs."""
    task = json.load(sys.stdin)
    arrays = []
    if task["inputs"] is not None:
        with np.load(task["inputs"]) as stored:
            arrays = [stored[name] for name in stored.files]
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
    if task["inputs"] is not None:
        names = [item.name for item in sessions[0].get_inputs()]
        sessions[0].run(None, dict(zip(names, arrays, strict=True)))
    after = peak_bytes()
    memory = None if before is None or after is None else after - before
    json.dump({"load_ms": 1000 * seconds, "peak_bytes": memory}, sys.stdout)


if __name__ == "__main__":
    main()
