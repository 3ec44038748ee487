"""The graph of rooms: what each may import, and that nothing imports in a circle."""

import ast
from collections.abc import Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.resources import files
from pathlib import Path

import pytest

# Files at the top of the core that every room may use.
COMMON = frozenset(
    {
        "compat",
        "cpu",
        "device",
        "errors",
        "hashing",
        "lazy",
        "options",
        "progress",
        "registry",
        "version",
    }
)
# What a room may import in addition to COMMON, itself and the rooms of the core that it lists.
CORE = {
    "checkpoints": frozenset(),
    "recipe": frozenset({"checkpoints"}),
    "artifacts": frozenset({"checkpoints", "recipe"}),
    "models": frozenset({"artifacts", "checkpoints", "recipe"}),
    "data": frozenset({"artifacts", "checkpoints", "models", "recipe"}),
    "calibration": frozenset({"checkpoints", "data", "models", "recipe"}),
    "merging": frozenset({"artifacts", "calibration", "checkpoints", "data", "models", "recipe"}),
    "quantization": frozenset(
        {"artifacts", "calibration", "checkpoints", "data", "models", "recipe"}
    ),
}
ALL_OF_CORE = frozenset(CORE)
# The rooms of exporters and runtime, from the lowest to the highest: each may import those before
# it in its line, and the whole core.
LINES = (
    (
        "runtime.ort",
        "exporters.compat",
        "exporters.memory",
        "exporters.packing",
        "exporters.files",
        "exporters.lowering",
        "exporters.formats",
        "exporters.verification",
        "exporters.graphs",
        "exporters.targets",
        "exporters.browser",
        "exporters.stage",
        "exporters",
    ),
    (
        "runtime.ort",
        "runtime.evaluation",
        "runtime.report",
        "runtime.stage",
        "runtime.inference",
        "runtime",
    ),
)
# The roof of the core, above exporters and runtime.
ROOF = ("pipeline", "api", "")
FOREIGN = {
    "core": {"onnx", "onnxruntime", "onnx_ir", "onnxscript", "typer", "rich", "click"},
    "exporters": {"typer", "rich", "click"},
    "runtime": {"typer", "rich", "click"},
    "cli": set(),
}
TOP = ("exporters", "runtime", "cli")


@cache
def modules() -> Mapping[str, Path]:
    """Every module's file by its name within the package, wherever it is installed."""
    roots = {"": Path(str(files("epmq_deploy")))}
    roots |= {name: Path(str(files(f"epmq_deploy.{name}"))).resolve() for name in TOP}
    found = {}
    for prefix, root in roots.items():
        for file in root.rglob("*.py"):
            parts = file.relative_to(root).with_suffix("").parts
            if not prefix and parts[0] in TOP:
                continue
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(part for part in (prefix, *parts) if part)] = file
    return found


def imported_names(file: Path) -> set[str]:
    """Dotted names a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(name: str) -> str:
    """The module of this package that an imported name comes from."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in modules():
        parts = parts[:-1]
    return ".".join(parts)


@cache
def arrows() -> Mapping[str, frozenset[str]]:
    """Modules by the module that imports them."""
    return {
        module: frozenset(
            module_of(name) for name in imported_names(file) if name.split(".")[0] == "epmq_deploy"
        )
        - {module}
        for module, file in modules().items()
    }


def room_of(module: str) -> str:
    """The room a module belongs to."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] in ("exporters", "runtime") else parts[0]


def may_import(room: str) -> frozenset[str]:
    """The rooms that a room may import."""
    if room == "cli":
        return frozenset(map(room_of, modules()))
    if room in ROOF:
        return frozenset(map(room_of, modules())) - {"cli"} - set(ROOF[ROOF.index(room) + 1 :])
    if room in COMMON:
        return COMMON
    if room in CORE:
        return COMMON | CORE[room] | {room}
    lower = [line[: line.index(room) + 1] for line in LINES if room in line]
    assert lower, f"{room} has no place in the graph of rooms"
    return COMMON | ALL_OF_CORE | {each for line in lower for each in line}


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """A circle of the graph; empty where there is none."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("room", sorted({room_of(module) for module in modules()}))
def test_a_room_imports_only_lower_rooms(room: str) -> None:
    allowed = may_import(room)
    wrong = {
        f"{module} -> {other}"
        for module, others in arrows().items()
        for other in others
        if room_of(module) == room and room_of(other) not in allowed
    }
    assert not wrong


def test_no_files_import_each_other_in_a_circle() -> None:
    assert len(arrows()) > 200
    assert circle(arrows()) == []


def test_no_rooms_import_each_other_in_a_circle() -> None:
    rooms: dict[str, set[str]] = {}
    for module, others in arrows().items():
        room = room_of(module)
        rooms.setdefault(room, set()).update({room_of(other) for other in others} - {room})
    assert circle(rooms) == []


@pytest.mark.parametrize("part", sorted(FOREIGN))
def test_other_packages_stay_where_they_belong(part: str) -> None:
    for module, file in modules().items():
        top = module.split(".")[0]
        if (top if top in TOP else "core") == part:
            assert not {name.split(".")[0] for name in imported_names(file)} & FOREIGN[part], file
