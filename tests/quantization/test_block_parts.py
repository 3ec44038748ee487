"""The parts that quantize a block, each by itself: recording, norms, statistics, groups."""

import logging
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epmq_deploy.calibration.block_runner import BlockRunner, SameForAllTasks
from epmq_deploy.calibration.cache import ActivationCache
from epmq_deploy.calibration.statistics import GroupSums, TaskStatistics
from epmq_deploy.errors import NumericsError
from epmq_deploy.models import Block, Group
from epmq_deploy.models.norms import pre_affine
from epmq_deploy.models.tokens import TokenWeights
from epmq_deploy.quantization.base import CalibrationSettings
from epmq_deploy.quantization.expert_features import ExpertRecorder
from epmq_deploy.quantization.group import GroupQuantizer
from epmq_deploy.quantization.group_statistics import (
    ActivationStatistics,
    GroupInputs,
    GroupStatistics,
)
from epmq_deploy.quantization.methods.gptq import METHOD as GPTQ
from epmq_deploy.quantization.methods.gptq import GptqOptions
from epmq_deploy.quantization.methods.rtn import METHOD as RTN
from epmq_deploy.quantization.methods.rtn import RtnOptions
from epmq_deploy.quantization.norms import NormRefit

WIDTH, TOKENS = 16, 5
TASKS = ("red", "blue")


class Layer(nn.Module):
    """A norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = hidden_states + self.linear(self.norm(hidden_states))
        return output


class Model(nn.Module):
    """One block behind a linear layer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.before = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Layer()])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.requires_grad_(False)

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = self.blocks[0](self.before(values))
        return output


BLOCK = Block("blocks.0", (Group(("blocks.0.linear",), norm="blocks.0.norm"),))
LINEAR, NORM = "blocks.0.linear", "blocks.0.norm"


class Experts:
    """Base and an expert by task."""

    tasks = TASKS

    def __init__(self) -> None:
        self.base = Model(9)
        self.models = {task: Model(seed) for seed, task in enumerate(TASKS, 1)}

    def base_tensor(self, name: str) -> Tensor:
        return self.base.get_parameter(name)

    def tensor(self, task: str, name: str) -> Tensor:
        return self.models[task].get_parameter(name)

    def become(self, task: str, *, without: Collection[str] = ()) -> nn.Module:
        return self.models[task]

    def module(self, task: str, name: str) -> nn.Module:
        return self.models[task].get_submodule(name)


def inputs_of(task: str, batches: int = 2) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(TASKS.index(task))
    return [(torch.randn(4, TOKENS, WIDTH, generator=generator),) for _ in range(batches)]


def settings(**changes: Any) -> CalibrationSettings:
    return CalibrationSettings(torch.float32, torch.float32, **changes)


def entered(model: nn.Module, cache: ActivationCache, experts: Experts | None) -> BlockRunner:
    """Return a runner whose batches are at the block."""
    family: Any = SimpleNamespace(
        embed=lambda model, values: model(values),
        tokens=lambda values, stream: TokenWeights(),
        float32_blocks=False,
    )
    batches = {task: (lambda task=task: inputs_of(task)) for task in TASKS}
    runner = BlockRunner(
        family,
        (BLOCK,),
        batches,
        SameForAllTasks(model),
        experts=experts,
        cache=cache,
        device=torch.device("cpu"),
    )
    runner.enter(BLOCK)
    return runner


def test_recorded_features_are_those_of_the_experts() -> None:
    experts, cache = Experts(), ActivationCache()
    runner = entered(Model(0), cache, experts)
    features = ExpertRecorder(runner, experts, cache, settings()).record(BLOCK, [LINEAR], [NORM])
    assert set(features) == set(TASKS)
    for task in TASKS:
        expert = experts.models[task]
        layer: Any = expert.blocks[0]
        for index, (values,) in enumerate(inputs_of(task)):
            hidden = expert.before(values)
            outputs = layer.norm(hidden) @ layer.linear.weight.T
            assert torch.allclose(features[task][index][LINEAR].value(), outputs, atol=1e-5)
            normed = pre_affine(layer.norm, hidden)
            assert torch.equal(features[task][index][NORM].value(), normed)
            batch = runner.batches[task][index]
            assert batch.expert is not None
            assert torch.equal(batch.expert.hidden.value(), layer(hidden))
            # The student waits at the entrance of the block.
            assert torch.equal(batch.student.hidden.value(), Model(0).before(values))


def test_nothing_is_recorded_where_no_expert_runs_along() -> None:
    cache = ActivationCache()
    runner = entered(Model(0), cache, None)
    recorder = ExpertRecorder(runner, None, cache, settings())
    assert recorder.record(BLOCK, [LINEAR], [NORM]) == {task: [] for task in TASKS}


def test_a_norm_takes_on_the_gain_and_bias_that_all_experts_share() -> None:
    model, experts, cache = Model(0), Experts(), ActivationCache()
    for expert in experts.models.values():
        expert.blocks[0].norm.load_state_dict(experts.base.blocks[0].norm.state_dict())  # type: ignore[union-attr,arg-type]
    runner = entered(model, cache, None)
    refit = NormRefit(
        model,
        SameForAllTasks(model),
        runner,
        experts,
        cache,
        settings(norm_mix=0.0, norm_damping=1e-9),
    )
    refitted = refit.refit(BLOCK, NORM, {}, pooled=False, done={})
    for name in ("weight", "bias"):
        expected = experts.base_tensor(f"{NORM}.{name}")
        assert torch.allclose(model.get_parameter(f"{NORM}.{name}"), expected, atol=1e-5)
        assert torch.equal(
            refitted.parameters[f"{NORM}.{name}"], model.get_parameter(f"{NORM}.{name}")
        )
    assert refitted.error_after < 1e-9 < refitted.error_before
    (values,) = inputs_of("blue")[1]
    assert torch.equal(refitted.output("blue", 1), refitted.norm(model.before(values)))


def group(model: Model, runner: BlockRunner) -> GroupInputs:
    """Return the block's one linear layer with its plain inputs."""

    def input_of(task: str, index: int) -> Tensor:
        layer: Any = model.blocks[0]
        normed: Tensor = layer.norm(runner.batches[task][index].student.hidden.value())
        return normed

    return GroupInputs([LINEAR], "", False, input_of, {})


def test_sums_weigh_tasks_as_the_method_says(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(0)
    runner = entered(model, ActivationCache(), None)
    source = ActivationStatistics(runner, None, settings())
    weights = iter((0.25, 2.0))
    method: Any = SimpleNamespace(task_weight=lambda statistics, options: next(weights))
    inputs = group(model, runner)
    with caplog.at_level(logging.WARNING):
        sums = GroupStatistics(model, source, None, method, GptqOptions()).sums(inputs)
    expected = torch.zeros(WIDTH, WIDTH)
    for weight, task in zip((0.25, 2.0), TASKS, strict=True):
        rows = torch.cat([inputs.input_of(task, index).flatten(0, 1) for index in range(2)])
        expected += weight * rows.T @ rows / len(rows)
    assert torch.allclose(sums.gram, expected, atol=1e-5)
    assert sums.weight == 2.25
    assert sums.tokens == 2 * 2 * 4 * TOKENS
    assert not caplog.messages


def test_what_is_wrong_with_statistics_names_layer_and_task() -> None:
    model = Model(0)
    runner = entered(model, ActivationCache(), None)
    source = ActivationStatistics(runner, None, settings())
    inputs = GroupInputs(
        [LINEAR],
        "",
        False,
        lambda task, index: torch.full((1, 1, WIDTH), torch.nan if task == "blue" else 1.0),
        {},
    )
    statistics = GroupStatistics(model, source, None, GPTQ, GptqOptions())
    with pytest.raises(NumericsError, match=rf"^layer {LINEAR}: task 'blue': activations are NaN"):
        statistics.sums(inputs)


def sums_of(rows: Tensor) -> GroupSums:
    sums = GroupSums.zeros(WIDTH, rows.device)
    gram = rows.T @ rows / len(rows)
    low, high = rows.amin(dim=0), rows.amax(dim=0)
    sums.add(TaskStatistics(gram, rows.double().mean(dim=0), len(rows), low=low, high=high), 1.0)
    return sums


def test_a_group_becomes_its_codes() -> None:
    model = Model(0)
    before = model.get_parameter(f"{NORM}.weight").clone()
    result = GroupQuantizer(model, GPTQ, GptqOptions(group_size=16), None).quantize(
        [LINEAR], sums_of(torch.randn(200, WIDTH))
    )
    assert list(result.layers) == [report.layer for report in result.reports] == [LINEAR]
    assert torch.equal(model.get_parameter(f"{LINEAR}.weight"), result.layers[LINEAR].dequantize())
    assert torch.equal(model.get_parameter(f"{LINEAR}.bias"), result.replaced[f"{LINEAR}.bias"])
    assert set(result.inputs) == {LINEAR}
    assert not result.errors
    assert torch.equal(model.get_parameter(f"{NORM}.weight"), before)


def test_without_rounding_a_group_gets_the_method_s_weights() -> None:
    model = Model(0)
    before = model.get_parameter(f"{LINEAR}.weight").clone()
    quantizer = GroupQuantizer(
        model, RTN, RtnOptions(), None, rounding=False, probe={LINEAR: (2, 4)}
    )
    result = quantizer.quantize([LINEAR], GroupSums.zeros(WIDTH, torch.device("cpu")))
    assert torch.equal(model.get_parameter(f"{LINEAR}.weight"), before)
    assert not result.layers
    assert not result.reports
    assert result.errors[LINEAR][2] > result.errors[LINEAR][4] > 0


def test_only_linear_layers_are_quantized() -> None:
    quantizer = GroupQuantizer(Model(0), RTN, RtnOptions(), None)
    with pytest.raises(TypeError, match=rf"^{NORM} is a LayerNorm, not a linear layer$"):
        quantizer.quantize([NORM], GroupSums.zeros(WIDTH, torch.device("cpu")))
