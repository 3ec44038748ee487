"""What may import what."""

import ast
from importlib.resources import files
from pathlib import Path

import pytest

ALLOWED = {
    "cli": {"epmq_deploy", "exporters", "runtime", "cli"},
    "exporters": {"epmq_deploy", "exporters"},
    "runtime": {"epmq_deploy", "runtime"},
    "epmq_deploy": {"epmq_deploy"},
}
FOREIGN = {
    "epmq_deploy": {"onnx", "onnxruntime", "onnx_ir", "onnxscript", "typer", "rich", "click"},
    "exporters": {"typer", "rich", "click"},
    "runtime": {"typer", "rich", "click"},
    "cli": set(),
}


def sources(room: str) -> list[Path]:
    """Python files of one room, wherever it is installed."""
    package = "epmq_deploy" if room == "epmq_deploy" else f"epmq_deploy.{room}"
    (root,) = {Path(str(files(package)))}
    rooms = set(ALLOWED) - {"epmq_deploy"} if room == "epmq_deploy" else set()
    return [file for file in root.rglob("*.py") if file.relative_to(root).parts[0] not in rooms]


def imported(file: Path) -> set[str]:
    """Dotted names a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def room_of(name: str) -> str:
    """The room a dotted name of this project belongs to."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "epmq_deploy"


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_run_one_way(room: str) -> None:
    found = sources(room)
    assert len(found) > 3
    for file in found:
        names = imported(file)
        ours = {room_of(name) for name in names if name.split(".")[0] == "epmq_deploy"}
        assert ours <= ALLOWED[room], file
        assert not {name.split(".")[0] for name in names} & FOREIGN[room], file
