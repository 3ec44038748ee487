"""The examples run, on few samples, and say what they promise."""

import json
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from importlib import util
from io import BytesIO
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from tiny_zoo import TASKS, TinyZoo

import epmq_deploy as epmq

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load_example(name: str) -> ModuleType:
    """Import one of the scripts, which are no package."""
    spec = util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def exported(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export that ``merge_and_quantize.py`` makes of two small experts."""
    output = tmp_path_factory.mktemp("example")
    example = load_example("merge_and_quantize")
    report = example.merge_and_quantize(tiny.recipe, output, samples=8, test_samples=8)
    lines = example.table(report).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["experts", "fp32 merged", "int8-expand"]
    return output / "exported"


def test_the_scripts_start_from_the_bundled_experts() -> None:
    for name in ("merge_and_quantize", "compare_methods"):
        zoo = load_example(name).ZOO
        assert len(epmq.load_recipe(zoo).tasks) == 8


def test_compare_methods(tiny: TinyZoo, tmp_path: Path) -> None:
    example = load_example("compare_methods")
    reports = example.compare_methods(tiny.recipe, tmp_path, samples=8, test_samples=8)
    assert set(reports) == set(example.METHODS)
    lines = example.table(reports).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(example.METHODS)


@pytest.fixture
def port(exported: Path) -> Iterator[int]:
    """The port at which ``serve.py`` answers."""
    server = load_example("serve").make_server(exported)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def post(port: int, path: str, body: bytes) -> tuple[int, dict[str, object]]:
    """Send ``body``; the status and the answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, body)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def test_serve(port: int) -> None:
    image = BytesIO()
    Image.new("RGB", (16, 16)).save(image, "PNG")
    status, answer = post(port, "/", image.getvalue())
    assert status == 200
    assert set(answer) == set(TASKS)
    status, answer = post(port, f"/?task={TASKS[0]}", image.getvalue())
    assert (status, set(answer)) == (200, {TASKS[0]})
    status, answer = post(port, "/?task=nothing", image.getvalue())
    assert status == 400
    assert "unknown task 'nothing'" in str(answer["error"])
    assert post(port, "/", b"no image")[0] == 400


def test_notebook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    namespace: dict[str, object] = {"__name__": "notebook"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "clear the outputs before committing"
            exec(compile("".join(cell["source"]), f"<cell {cell['id']}>", "exec"), namespace)
    report = namespace["report"]
    assert isinstance(report, epmq.EvalReport)
    assert set(report.samples) == {"mnist", "clipart"}
