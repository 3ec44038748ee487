"""What an ``epmq`` command costs: seconds, and bytes of memory in all and beyond its imports.

python benchmarks/command_cost.py export quantized -o exported

Prints one line of JSON last. Imports nothing but the command: whatever else is loaded would count.
"""

import os

# Read when torch is imported; see epmq_deploy.cli.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import sys
import time
from pathlib import Path

# A command imports its stage when it starts.
import epmq_deploy.exporters.export_stage  # noqa: F401
from epmq_deploy.cli.main import main


def resident() -> int:
    """Bytes in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Of this process alone; ``ru_maxrss`` starts at what the process that made it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    imports = resident()
    started = time.perf_counter()
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        if end.code:
            raise
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "bytes": peak(), "imports": imports}))
