"""All stages and ``load`` where little is given: read-only inputs, no home, another locale."""

import ctypes
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_text import TEXT_TASKS, TinyText
from tiny_zoo import TinyZoo

# Of Linux: root's right to write whatever a file's mode says, and the call that gives it up.
_CAP_DAC_OVERRIDE, _PR_CAPBSET_DROP = 1, 24

SCRIPT = """
import json, sys
from epmq_deploy.cli.main import main

def command(*arguments):
    try:
        main(list(arguments))
    except SystemExit as error:
        if error.code:
            sys.exit(f"{arguments[0]}: {error.code}")

recipe, out = sys.argv[1:3]
item = json.loads(sys.argv[3])
command("merge", recipe, "-o", out + "/merged")
command("quantize", out + "/merged", "-o", out + "/quantized")
command("export", out + "/quantized", "-o", out + "/exported")
command("eval", out + "/exported")
import epmq_deploy as epmq
model = epmq.load(out + "/exported")
answers = {task: prediction.label for task, prediction in model(item).items()}
# Everything is there already.
command("run", recipe, "-o", out, "--quiet")
print(json.dumps(answers))
"""
ENVIRONMENTS = {
    "posix": {"LC_ALL": "C"},
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    # Of users without an entry in the system's list, and of services.
    "home is read-only": {"LC_ALL": "C.UTF-8", "HOME": "."},
}
NAMES = ["ja – naïve", "nein 🙈", "größer"]


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder with a short name."""
    folder = Path(tempfile.mkdtemp(prefix="epmq tests "))
    yield folder
    make_writable(folder)
    shutil.rmtree(folder)


def obey_modes() -> None:
    """Let modes of files count for this process and those it starts, even if it is root's."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, 0, 0, 0)


def make_writable(folder: Path) -> None:
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        path.chmod(path.stat().st_mode | stat.S_IRWXU)


def read_only(folder: Path) -> None:
    """Take the right to write from everything in a folder."""
    for path in (*folder.rglob("*"), folder):
        path.chmod(path.stat().st_mode & ~0o222 | 0o444 | (0o111 if path.is_dir() else 0))


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything in a folder."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in (folder, *folder.rglob("*"))
    }


def named(tiny: TinyText, inputs: Path) -> None:
    """A copy of tiny models with class names that ASCII lacks."""
    shutil.copytree(tiny.folder, inputs)
    for task, classes in TEXT_TASKS.items():
        file = inputs / "experts" / task / "config.json"
        labels = dict(enumerate(NAMES[:classes]))
        config = json.loads(file.read_text()) | {
            "id2label": labels,
            "label2id": {name: label for label, name in labels.items()},
        }
        file.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


def run_all(outside: Path, inputs: Path, environment: str, item: str) -> dict[str, str]:
    """Run every stage and ask the export; what it answers, by task."""
    output, cwd, scratch = (
        outside / name for name in ("out" if environment == "ascii" else "out 🚀", "cwd", "tmp")
    )
    for folder in (output, cwd, scratch):
        folder.mkdir()
    read_only(inputs)
    read_only(cwd)
    before = contents(inputs) | contents(cwd)
    touch = subprocess.run(
        [sys.executable, "-c", "open('x', 'w')"], cwd=cwd, check=False, preexec_fn=obey_modes
    )
    assert touch.returncode, "modes of files do not count"
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LD_LIBRARY_PATH")
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT]
        + [os.fsencode(path) for path in (inputs / "recipe.yaml", output, json.dumps(item))],
        capture_output=True,
        cwd=cwd,
        env={**kept, **ENVIRONMENTS[environment], "TMPDIR": str(scratch)},
        check=False,
        preexec_fn=obey_modes,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]
    assert contents(inputs) | contents(cwd) == before
    assert not list(scratch.glob("epmq*"))
    answers: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_text_classifiers(tiny_text: TinyText, outside: Path, environment: str) -> None:
    inputs = outside / ("models and data" if environment == "ascii" else "models and data 🤗")
    named(tiny_text, inputs)
    answers = run_all(outside, inputs, environment, "red tree – 🌲")
    assert set(answers) == {"topic", "tone"}
    assert set(answers.values()) <= set(NAMES)


def test_image_classifiers(tiny: TinyZoo, outside: Path) -> None:
    inputs = outside / "models and data 🤗"
    shutil.copytree(tiny.folder, inputs)
    from PIL import Image

    Image.new("RGB", (20, 30), "red").save(inputs / "a picture 🖼.png")
    answers = run_all(outside, inputs, "home is read-only", str(inputs / "a picture 🖼.png"))
    assert len(answers) == 3


@pytest.mark.parametrize("wrong", [0, 1])
def test_paths_that_the_locale_cannot_write_are_refused(outside: Path, wrong: int) -> None:
    """Libraries below open files by names in UTF-8."""
    (outside / "recipe.yaml").write_text("base: {path: b}\ntasks: {t: {expert: e}}\n")
    shutil.copy(outside / "recipe.yaml", outside / "🤗.yaml")
    recipe, out = (("🤗.yaml", "out"), ("recipe.yaml", "🤗"))[wrong]
    code = "import sys; from epmq_deploy.cli.main import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "merge", os.fsencode(recipe), "-o", os.fsencode(out)],
        capture_output=True,
        cwd=outside,
        env={**os.environ, **ENVIRONMENTS["ascii"]},
        check=False,
    )
    message = r"not a name in this system's encoding \(ascii\); rename it, or set .* PYTHONUTF8=1"
    assert re.search(message, done.stderr.decode())
    assert done.returncode == 2
