"""``epmq run`` killed by SIGKILL: the next run of the same output cleans up after it."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from command_line import run
from tiny_zoo import TinyZoo

from epmq_deploy.artifacts.locks import locked

QUICK = ["--set", "export.formats=[matmulnbits],eval.latency_runs=1,eval.experts=false", "-q"]
# Is killed just before the output of one stage is complete.
SCRIPT = """
import os, signal, sys
from epmq_deploy.artifacts import outputs
from epmq_deploy.cli.main import main
def killed(folder, manifest):
    if manifest.stage == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(folder, manifest)
original = outputs.finish_output
outputs.finish_output = killed
main(sys.argv[2:])
"""


@pytest.mark.parametrize("stage", ["merge", "quantize", "export"])
def test_the_next_run_removes_what_a_killed_one_left(
    tiny: TinyZoo, tmp_path: Path, stage: str
) -> None:
    arguments = ["run", str(tiny.recipe), "-o", str(tmp_path / "out"), *QUICK]
    killed = subprocess.run([sys.executable, "-P", "-c", SCRIPT, stage, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")}
    assert len(left) >= 4  # three locks and a temporary folder
    assert run(*arguments) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "merged",
        "quantized",
        "exported",
    }
    assert not list((tmp_path / "out" / "exported").glob(".*"))


@pytest.mark.parametrize(
    ("output", "arguments"),
    [
        ("out/merged", ["run", "RECIPE", "-o", "out", "--overwrite"]),
        ("out/exported", ["run", "RECIPE", "-o", "out"]),
        ("out/merged", ["merge", "RECIPE", "-o", "out/merged"]),
        ("q", ["quantize", "merged", "-o", "q", "--recipe", "RECIPE"]),
        ("e", ["export", "quantized", "-o", "e", "--recipe", "RECIPE"]),
    ],
)
def test_an_output_in_use_is_refused_before_any_work(
    tiny: TinyZoo,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    arguments: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(tiny.recipe) if item == "RECIPE" else item for item in arguments]
    taken, done = threading.Event(), threading.Event()

    def other_run() -> None:
        with locked(tmp_path / output):
            taken.set()
            done.wait()

    thread = threading.Thread(target=other_run)
    thread.start()
    taken.wait()
    assert run(*given, "-q") == 2
    done.set()
    thread.join()
    assert "another run is using it (process " in capsys.readouterr().err
    assert not (tmp_path / output).exists()
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == "[]"
