"""Tests remember traces: a graph read back is the graph traced, and only of the same model."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from remembered_traces import remembering
from torch import nn

from epmq_deploy.exporters import format_names
from epmq_deploy.exporters.graphs import build
from epmq_deploy.exporters.graphs.trace import trace
from epmq_deploy.models.deployable import Deployable


class Tracing:
    """Traces, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *arguments: Any) -> ir.Model:
        self.count += 1
        return trace(*arguments)


@pytest.mark.parametrize("outside", [False, True])
def test_files_of_remembered_traces_are_the_same(
    tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outside: bool
) -> None:
    """Both in every format: the first run traces, the second reads both traces back."""
    layers = tools.outside if outside else ()
    case = tools.make_case(lambda name, weight: (4, 16, name.endswith("fc1")), layers)
    tracing = Tracing()
    (tmp_path / "traces").mkdir()
    monkeypatch.setattr(build, "trace", remembering(tmp_path / "traces", tracing))
    contents = []
    for run in ("first", "second"):
        folder = tmp_path / run
        folder.mkdir()
        tools.export(case, format_names(), folder)
        contents.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert tracing.count == 2
    assert contents[0].keys() == contents[1].keys()
    for name, content in contents[0].items():
        assert contents[1][name] == content, name


def changed_weight(model: Deployable) -> None:
    next(model.backbone.parameters()).flatten()[-1].add_(1e-3)


def changed_setting(model: Deployable) -> None:
    model.backbone.config.hidden_act = "relu"


def changed_name(model: Deployable) -> None:
    model.tasks = tuple(f"other {task}" for task in model.tasks)


def other_module(model: Deployable) -> None:
    model.heads[0].bias = None if model.heads[0].bias is not None else nn.Parameter(torch.ones(7))


@pytest.mark.parametrize("change", [changed_weight, changed_setting, changed_name, other_module])
def test_another_model_is_traced_anew(
    tools: SimpleNamespace, tmp_path: Path, change: Callable[[Deployable], None]
) -> None:
    count = 0

    def counting(*_: Any) -> ir.Model:
        nonlocal count
        count += 1
        return ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)

    remembered = remembering(tmp_path, counting)
    case = tools.make_case(lambda name, weight: (4, 16, True))
    for _ in range(2):
        remembered(case.model, (case.images,), 21)
    assert count == 1
    remembered(case.model, (case.images,), 22)
    remembered(case.model, (case.images[:, :, :8],), 21)
    assert count == 3
    with torch.no_grad():
        change(case.model)
    remembered(case.model, (case.images,), 21)
    assert count == 4


def test_code_of_models_of_their_own_is_not_remembered(
    tools: SimpleNamespace, tmp_path: Path
) -> None:
    """The next model may have other code of the same name."""

    class Own(nn.Module):
        pass

    calls = []

    def counting(*_: Any) -> ir.Model:
        calls.append(1)
        return ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)

    case = tools.make_case(lambda name, weight: (4, 16, True))
    case.model.backbone.own = Own()
    for _ in range(2):
        remembering(tmp_path, counting)(case.model, (case.images,), 21)
    assert len(calls) == 2
