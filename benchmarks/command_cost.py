"""What an ``epmq`` command costs, and how soon it answers.

    python benchmarks/command_cost.py
    python benchmarks/command_cost.py export quantized -o exported

Without arguments: the seconds that answers without computation take, each the shortest of several
runs, and their ratios to ``python -c pass``, measured in turns.

With a command's arguments: the last line is JSON. ``seconds`` is the command's time; ``bytes`` the
largest peak of any one process, the command's own or one it starts; ``together`` the largest sum of
them all at one moment, sampled every few milliseconds; ``imports`` what was resident before the
command began. Nothing but the command is imported: whatever else is loaded would count.
"""

import os

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

_INTERVAL = 0.005


def resident(process: str = "self") -> int:
    """Return the bytes in memory now."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak(process: str = "self") -> int:
    """Return one process's peak; ``ru_maxrss`` starts at that of the process that forked it."""
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
        """Sample until the process ends."""
        while True:
            sizes = [self._child(process) for process in self._children()]
            self.together = max(self.together, resident() + sum(sizes))
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


_PASS = "python -c pass"
_EPMQ = "import sys; from epmq_deploy.cli.main import main; main(sys.argv[1:])"
_STARTS = {
    _PASS: ("pass",),
    "import epmq_deploy": ("import epmq_deploy",),
    "epmq --version": (_EPMQ, "--version"),
    "epmq --help": (_EPMQ, "--help"),
    "epmq merge --help": (_EPMQ, "merge", "--help"),
    "epmq merge --wrong": (_EPMQ, "merge", "--wrong"),
}
_RUNS = 15


def start_costs() -> dict[str, dict[str, float]]:
    """Return seconds of every start, and their ratio to Python's own; runs take turns."""
    seconds = dict.fromkeys(_STARTS, float("inf"))
    for _ in range(_RUNS):
        for name, arguments in _STARTS.items():
            started = time.perf_counter()
            # A wrong flag is meant to fail.
            subprocess.run([sys.executable, "-c", *arguments], capture_output=True, check=False)
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return {
        name: {"seconds": round(best, 3), "ratio": round(best / seconds[_PASS], 1)}
        for name, best in seconds.items()
    }


def command_cost(arguments: list[str]) -> dict[str, float]:
    """Run a command in this process and return what it cost."""
    # A command imports its stage when it starts.
    import epmq_deploy.exporters.stage  # noqa: F401
    from epmq_deploy.cli.main import main

    imports = resident()
    children = Children()
    children.start()
    started = time.perf_counter()
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise
    return {
        "seconds": time.perf_counter() - started,
        "bytes": max(peak(), children.largest),
        "together": children.together,
        "imports": imports,
    }


if __name__ == "__main__":
    print(json.dumps(command_cost(sys.argv[1:]) if sys.argv[1:] else start_costs()))
