"""Load time and peak memory of each graph's session, measured in child processes."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from epmq_deploy.errors import NumericsError
from epmq_deploy.models.text_generation.special_tokens import SpecialTokens

_PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True)
class Footprint:
    """What one graph's session takes.

    Attributes:
        load_ms: milliseconds to create it from files the system has read before.
        peak_bytes: resident memory that this and running one sample added at most, in a process
            with nothing else; None where the system does not say.
    """

    load_ms: float
    peak_bytes: int | None


def median_footprint(measured: Sequence[Footprint]) -> Footprint:
    """Medians of several measurements of one graph."""
    peaks = [item.peak_bytes for item in measured if item.peak_bytes is not None]
    return Footprint(
        load_ms=median(item.load_ms for item in measured),
        peak_bytes=int(median(peaks)) if peaks else None,
    )


def measure_footprint(
    files: Sequence[Path],
    inputs: Sequence[np.ndarray[Any, Any]],
    *,
    provider: str,
    threads: int | None,
    session_config: Mapping[str, str],
    special_tokens: SpecialTokens | None = None,
) -> Footprint:
    """Create a format's sessions and run one sample, in a process of their own.

    Args:
        files: its ONNX files, in the order they run.
        inputs: one sample, arrays in the order of the first graph's inputs; where texts are
            written, token ids, mask and the number of tokens to write.
        provider: onnxruntime's name of it.
        threads: intra-op threads; default: onnxruntime's choice.
        session_config: session options the graphs were exported for.
        special_tokens: for graphs that generate text together.

    Raises:
        NumericsError: the process failed; with what it said last.
    """
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "inputs.npz"
        np.savez(stored, *inputs)
        task = {
            "files": [str(file) for file in files],
            "inputs": str(stored),
            "provider": provider,
            "threads": threads,
            "session_config": dict(session_config),
            "special_tokens": special_tokens and asdict(special_tokens),
        }
        # -P keeps the script's own folder off the path, where modules have names of common use.
        done = subprocess.run(
            [sys.executable, "-P", str(_PROBE)],
            input=json.dumps(task),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise NumericsError(
            f"{files[0]}: measuring its memory in a separate process failed ({said})"
        )
    return Footprint(**json.loads(done.stdout))
