"""Moving batches through blocks: the same as running the whole model, and no block twice."""

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epmq_deploy.calibration.block_runner import BlockRunner, SameForAllTasks
from epmq_deploy.calibration.cache import ActivationCache
from epmq_deploy.models import Block, Group
from epmq_deploy.models.tokens import TokenWeights

WIDTH = 6


class Layer(nn.Module):
    """A block of one linear layer that counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.runs = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.runs += 1
        output: Tensor = hidden_states + self.linear(hidden_states).tanh()
        return output


class TwoStreams(nn.Module):
    """Two sequences of two blocks each; the second one receives what the first one gives."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.first = nn.ModuleList([Layer(), Layer()])
        self.second = nn.ModuleList([Layer(), Layer()])

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.before(values)
        for layer in (*self.first, *self.second):
            hidden = layer(hidden)
        return hidden


BLOCKS = tuple(
    Block(f"{stream}.{index}", (Group((f"{stream}.{index}.linear",)),), stream=stream)
    for stream in ("first", "second")
    for index in range(2)
)


class Experts:
    """A model by task; remembers which modules were not needed."""

    def __init__(self, models: dict[str, TwoStreams]) -> None:
        self.models = models
        self.unneeded: list[tuple[str, ...]] = []

    def become(self, task: str, *, without: Collection[str] = ()) -> nn.Module:
        self.unneeded.append(tuple(without))
        return self.models[task]

    def module(self, task: str, name: str) -> nn.Module:
        return self.models[task].get_submodule(name)


@pytest.fixture
def model() -> TwoStreams:
    torch.manual_seed(0)
    return TwoStreams().eval()


def inputs() -> dict[str, list[tuple[Tensor, ...]]]:
    """Two batches of one task, one of another."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"red": (3, 2), "blue": (4,)}
    return {
        task: [(torch.randn(size, 5, WIDTH, generator=generator),) for size in counts]
        for task, counts in sizes.items()
    }


def runner_of(student: Any, experts: Experts | None = None, **options: Any) -> BlockRunner:
    """Return a runner over the batches above."""
    family: Any = SimpleNamespace(
        embed=lambda model, values: model(values),
        float32_blocks=False,
        tokens=lambda values, *, stream: TokenWeights(pooled=torch.zeros(len(values)).long()),
    )
    batches = {task: (lambda values=values: values) for task, values in inputs().items()}
    return BlockRunner(
        family,
        BLOCKS,
        batches,
        student if isinstance(student, Experts) else SameForAllTasks(student),
        experts=experts,
        cache=ActivationCache(),
        device=torch.device("cpu"),
        **options,
    )


def run(runner: BlockRunner) -> None:
    """Take all batches through all blocks."""
    for block in BLOCKS:
        runner.enter(block)
        runner.advance_experts(block)
        runner.advance(block)


def test_batches_come_out_as_from_the_whole_model(model: TwoStreams) -> None:
    runner = runner_of(model)
    run(runner)
    for task, batches in inputs().items():
        assert len(runner.batches[task]) == len(batches)
        for batch, (values,) in zip(runner.batches[task], batches, strict=True):
            with torch.inference_mode():
                assert torch.equal(batch.student.hidden.value(), model(values))
            assert batch.expert is None


def test_experts_run_along_on_their_own_path(model: TwoStreams) -> None:
    experts = Experts({"red": TwoStreams().eval(), "blue": TwoStreams().eval()})
    runner = runner_of(model, experts)
    run(runner)
    for task, batches in inputs().items():
        for batch, (values,) in zip(runner.batches[task], batches, strict=True):
            assert batch.expert is not None
            with torch.inference_mode():
                assert torch.equal(batch.student.hidden.value(), model(values))
                assert torch.equal(batch.expert.hidden.value(), experts.models[task](values))


def test_every_task_may_have_a_model_of_its_own(model: TwoStreams) -> None:
    source = Experts({"red": model, "blue": TwoStreams().eval()})
    runner = runner_of(source)
    run(runner)
    for task, batches in inputs().items():
        for batch, (values,) in zip(runner.batches[task], batches, strict=True):
            with torch.inference_mode():
                assert torch.equal(batch.student.hidden.value(), source.models[task](values))


def test_a_stream_is_entered_with_the_blocks_before_it_as_they_are_then(model: TwoStreams) -> None:
    runner = runner_of(model)
    for block in BLOCKS[:2]:
        runner.enter(block)
        runner.advance(block)
    with torch.no_grad():
        model.first[1].linear.weight.zero_()  # type: ignore[union-attr]
        model.first[1].linear.bias.zero_()  # type: ignore[union-attr]
    for block in BLOCKS[2:]:
        runner.enter(block)
        runner.advance(block)
    for batch, (values,) in zip(runner.batches["red"], inputs()["red"], strict=True):
        with torch.inference_mode():
            assert torch.equal(batch.student.hidden.value(), model(values))


def test_blocks_run_once_a_batch_and_entering_again_changes_nothing(model: TwoStreams) -> None:
    runner = runner_of(model)
    for block in BLOCKS[:2]:
        runner.enter(block)
        entered = [batch.student.hidden.value() for batch in runner.batches["red"]]
        if block is not BLOCKS[0]:
            runner.enter(block)
        after = [batch.student.hidden.value() for batch in runner.batches["red"]]
        assert all(map(torch.equal, entered, after))
        runner.advance(block)
    assert [layer.runs for layer in model.first] == [3, 3]  # type: ignore[union-attr]
    assert [layer.runs for layer in model.second] == [0, 0]  # type: ignore[union-attr]


def test_only_weights_before_a_stream_are_asked_for(model: TwoStreams) -> None:
    experts = Experts({"red": model, "blue": model})
    run(runner_of(model, experts))
    names = [block.name for block in BLOCKS]
    assert experts.unneeded == [tuple(names)] * 2 + [tuple(names[2:])] * 2


def test_token_weights_are_those_of_the_stream(model: TwoStreams) -> None:
    runner = runner_of(model)
    runner.enter(BLOCKS[0])
    batch = runner.batches["red"][0]
    assert set(batch.tokens) == {"first", "second"}
    activations = torch.zeros(3, 5, WIDTH)
    assert batch.token_weights("first", activations, 1.0) is None
    weights = batch.token_weights("first", activations, 0.25)
    assert weights is not None
    assert torch.equal(weights, torch.tensor([1.0, 0.25, 0.25, 0.25, 0.25]).expand(3, 5))


def test_hidden_states_are_kept_in_the_dtype_given(model: TwoStreams) -> None:
    runner = runner_of(model, dtype=torch.float16)
    runner.enter(BLOCKS[0])
    hidden = runner.batches["red"][0].student.hidden
    assert hidden.peek().dtype == torch.float16
    assert hidden.value().dtype == torch.float32


def test_without_tasks_nothing_runs(model: TwoStreams) -> None:
    runner = BlockRunner(
        SimpleNamespace(),  # type: ignore[arg-type]
        BLOCKS,
        {},
        SameForAllTasks(model),
        cache=ActivationCache(),
        device=torch.device("cpu"),
    )
    run(runner)
    assert runner.batches == {}
    assert model.first[0].runs == 0  # type: ignore[union-attr]
