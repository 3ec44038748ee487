"""What an ``epmq`` command costs: seconds, and bytes of memory by several readings.

python benchmarks/command_cost.py export quantized -o exported

Prints one line of JSON last: ``bytes`` is the largest peak of any one process, the command's own or
one it starts; ``together`` the largest sum of them all at one moment, looked at every few
milliseconds; ``imports`` what was resident before the command began. Imports nothing but the
command: whatever else is loaded would count.
"""

import os

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import sys
import threading
import time
from pathlib import Path

# A command imports its stage when it starts.
import epmq_deploy.exporters.stage  # noqa: F401
from epmq_deploy.cli.main import main

_INTERVAL = 0.005


def resident(process: str = "self") -> int:
    """Bytes in memory now."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak(process: str = "self") -> int:
    """Of one process alone; ``ru_maxrss`` starts at what the process that made it had."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


class Children(threading.Thread):
    """Watches the processes that this one starts.

    Attributes:
        largest: peak of any of them.
        together: largest sum of this process and them.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self.together = 0, 0
        self._own = Path("/proc/self/cmdline").read_bytes()

    def run(self) -> None:
        """Look until the process ends."""
        while True:
            found = [self._child(process) for process in self._children()]
            self.together = max(self.together, resident() + sum(found))
            time.sleep(_INTERVAL)

    def _children(self) -> list[str]:
        tasks = Path("/proc/self/task").glob("*/children")
        return [process for task in tasks for process in _text(task).split()]

    def _child(self, process: str) -> int:
        try:
            # Until it runs a program of its own it is this process, in memory as well.
            if Path(f"/proc/{process}/cmdline").read_bytes() in (self._own, b""):
                return 0
            self.largest = max(self.largest, peak(process))
            return resident(process)
        except (OSError, StopIteration):
            # It has ended.
            return 0


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    imports = resident()
    children = Children()
    children.start()
    started = time.perf_counter()
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        if end.code:
            raise
    cost = {
        "seconds": time.perf_counter() - started,
        "bytes": max(peak(), children.largest),
        "together": children.together,
        "imports": imports,
    }
    print(json.dumps(cost))
