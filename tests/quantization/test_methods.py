"""Calibration targets: the identity behind them, and their limits."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from epmq_deploy.calibration.statistics import Accumulator, GroupSums, TaskStatistics
from epmq_deploy.quantization.base import LayerWeights
from epmq_deploy.quantization.layer import fit_bias, quantize_layer
from epmq_deploy.quantization.methods.epmq import METHOD as EPMQ
from epmq_deploy.quantization.methods.epmq import EpmqOptions
from epmq_deploy.quantization.methods.gptq import METHOD as GPTQ
from epmq_deploy.quantization.methods.gptq import GptqOptions

ROWS, COLUMNS = 6, 24
EXACT: dict[str, Any] = {"solver": "float64"}


def inputs_of(seed: int, tokens: int = 80) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator)
    return torch.randn(tokens, COLUMNS, generator=generator) @ mixing + 0.5


def weight_of(seed: int) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def bias_of(seed: int) -> Tensor:
    return torch.randn(ROWS, generator=torch.Generator().manual_seed(seed + 100))


def statistics_of(inputs: Tensor) -> TaskStatistics:
    accumulator = Accumulator()
    accumulator.add(inputs)
    return accumulator.statistics()


def exact_statistics(inputs: Tensor, expert: Tensor, own: Tensor, mix: float) -> TaskStatistics:
    """Return statistics without rounding; ``own`` are the expert's own inputs."""
    x, z, weight = inputs.double(), own.double(), expert.double()
    target = ((1 - mix) * x + mix * z) @ weight.T
    return TaskStatistics(
        gram=x.T @ x / len(x),
        mean=x.mean(dim=0),
        tokens=len(x),
        cross={"layer": target.T @ x / len(x)},
        output_mean={"layer": target.mean(dim=0)},
    )


def epmq_sums(
    inputs: list[Tensor],
    experts: list[Tensor],
    options: EpmqOptions,
    own: list[Tensor] | None = None,
    biases: list[Tensor] | None = None,
) -> GroupSums:
    """Sum over tasks; ``own`` are the experts' own inputs; default: the student's."""
    sums = GroupSums.zeros(COLUMNS, torch.device("cpu"))
    tasks = zip(inputs, experts, own or inputs, strict=True)
    for index, (features, expert, expert_features) in enumerate(tasks):
        mix = EPMQ.calibration(options).mix
        statistics = exact_statistics(features, expert, expert_features, mix)
        bias = None if biases is None else {"layer": biases[index]}
        sums.add(statistics, EPMQ.task_weight(statistics, options), bias)
    return sums


@pytest.mark.parametrize("normalization", ["frobenius", "none"])
@pytest.mark.parametrize(("alpha", "rho"), [(0.0, 1.0), (0.3, 2.2), (1.0, 0.0)])
def test_stated_objective_equals_the_solver_s_up_to_a_constant(
    normalization: Literal["frobenius", "none"], alpha: float, rho: float
) -> None:
    options = EpmqOptions(
        solver="float64", anchor=0.3, alpha=alpha, rho=rho, normalization=normalization
    )
    inputs, own = [inputs_of(1), inputs_of(2, 50)], [inputs_of(8), inputs_of(9, 50)]
    experts, merged, base = [weight_of(3), weight_of(4)], weight_of(5), weight_of(10)
    sums = epmq_sums(inputs, experts, options, own)
    problem = EPMQ.problem(
        LayerWeights("layer", merged, base=base), sums, EPMQ.hessian(sums, options), options
    )

    def stated(candidate: Tensor) -> float:
        anchor = rho * merged.double() + (1 - rho) * base.double()
        total = 0.3 * float((candidate - anchor).square().sum())
        for x, z, expert in zip(inputs, own, experts, strict=True):
            weight = EPMQ.task_weight(exact_statistics(x, expert, z, alpha), options)
            target = ((1 - alpha) * x.double() + alpha * z.double()) @ expert.double().T
            miss = x.double() @ candidate.T - target
            total += weight * float(miss.square().sum()) / len(x)
        return total

    def solved(candidate: Tensor) -> float:
        error = candidate - problem.weight
        return float(torch.trace(error @ problem.hessian.matrix @ error.T))

    first, second = weight_of(6).double(), weight_of(7).double()
    assert stated(first) - stated(second) == pytest.approx(solved(first) - solved(second), rel=1e-9)


def joint_brute_force(
    inputs: list[Tensor],
    experts: list[Tensor],
    biases: list[Tensor],
    weights: list[float],
    anchor: Tensor,
    bias_anchor: Tensor,
    strength: float,
) -> Tensor:
    """Best ``[W b]`` of the stated problem by least squares with a column of ones."""
    rows, targets = [], []
    for x, expert, bias, weight in zip(inputs, experts, biases, weights, strict=True):
        root = (weight / len(x)) ** 0.5
        ones = torch.ones(len(x), 1, dtype=torch.float64)
        rows.append(root * torch.cat([x.double(), ones], dim=1))
        targets.append(root * (x.double() @ expert.double().T + bias.double()))
    rows.append(strength**0.5 * torch.eye(COLUMNS + 1, dtype=torch.float64))
    pulled = torch.cat([anchor.double(), bias_anchor.double()[:, None]], dim=1)
    targets.append(strength**0.5 * pulled.T)
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution.T


@pytest.mark.parametrize("rho", [1.0, 2.2])
def test_joint_bias_equals_least_squares_with_a_column_of_ones(rho: float) -> None:
    options = EpmqOptions(
        solver="float64", anchor=0.3, alpha=0.0, rho=rho, normalization="none", bias="joint"
    )
    inputs, experts = [inputs_of(1), inputs_of(2, 50) - 2], [weight_of(3), weight_of(4)]
    biases, merged, base = [bias_of(1), bias_of(2)], weight_of(5), weight_of(10)
    sums = epmq_sums(inputs, experts, options, biases=biases)
    layer = LayerWeights("layer", merged, bias_of(3), base, bias_of(4))
    problem = EPMQ.problem(layer, sums, EPMQ.hessian(sums, options), options)
    anchor = rho * merged.double() + (1 - rho) * base.double()
    bias_anchor = rho * bias_of(3).double() + (1 - rho) * bias_of(4).double()
    best = joint_brute_force(inputs, experts, biases, [1, 1], anchor, bias_anchor, 0.3)
    assert torch.allclose(problem.weight, best[:, :-1], rtol=1e-9, atol=1e-9)
    assert problem.bias_anchor is not None
    assert torch.allclose(problem.bias_anchor.double(), bias_anchor, atol=1e-6)
    bias = fit_bias("layer", bias_of(3), problem.weight, problem, sums)
    # Biases are float32.
    assert torch.allclose(bias.double(), best[:, -1], atol=1e-5)


def test_joint_objective_is_that_of_every_weight_with_its_best_bias() -> None:
    options = EpmqOptions(
        solver="float64", anchor=0.3, alpha=0.0, rho=1.0, normalization="none", bias="joint"
    )
    inputs, experts = [inputs_of(1), inputs_of(2, 50) - 2], [weight_of(3), weight_of(4)]
    biases, merged = [bias_of(1), bias_of(2)], weight_of(5)
    sums = epmq_sums(inputs, experts, options, biases=biases)
    layer = LayerWeights("layer", merged, bias_of(3), merged, bias_of(3))
    problem = EPMQ.problem(layer, sums, EPMQ.hessian(sums, options), options)

    def stated(candidate: Tensor) -> float:
        misses = []
        for x, expert, bias in zip(inputs, experts, biases, strict=True):
            target = x.double() @ expert.double().T + bias.double()
            misses.append(target - x.double() @ candidate.T)
        total = sum(miss.mean(dim=0) for miss in misses) + 0.3 * bias_of(3).double()
        best = total / (len(inputs) + 0.3)
        lost = sum(float((miss - best).square().sum()) / len(miss) for miss in misses)
        lost += 0.3 * float((best - bias_of(3).double()).square().sum())
        return lost + 0.3 * float((candidate - merged.double()).square().sum())

    first, second = weight_of(6).double(), weight_of(7).double()
    solved = [problem.hessian.quadratic(each - problem.weight) for each in (first, second)]
    assert stated(first) - stated(second) == pytest.approx(solved[0] - solved[1], rel=1e-9)


def test_joint_gptq_keeps_its_target_and_loses_less() -> None:
    features, merged = inputs_of(1) + 3, weight_of(2)
    sums = GroupSums.zeros(COLUMNS, torch.device("cpu"))
    sums.add(exact_statistics(features, merged, features, 0.0), 1.0)
    layer = LayerWeights("layer", merged, bias_of(1))
    target = features.double() @ merged.double().T + bias_of(1).double()
    lost = {}
    for bias in ("joint", "after"):
        options = GptqOptions(bits=2, group_size=16, damping=1e-6, bias=bias)
        problem = GPTQ.problem(layer, sums, GPTQ.hessian(sums, options), options)
        assert torch.equal(problem.weight, merged.double())
        done = quantize_layer("layer", bias_of(1), problem, sums, options)
        assert done.bias is not None
        outputs = features.double() @ done.linear.dequantize().double().T + done.bias.double()
        lost[bias] = float((outputs - target).square().mean())
    assert lost["joint"] < 0.95 * lost["after"]


def test_layers_of_a_group_share_one_factor() -> None:
    options = EpmqOptions(**EXACT, preset="paper", bias="joint")
    sums = epmq_sums([inputs_of(1)], [weight_of(2)], options, biases=[bias_of(1)])
    hessian = EPMQ.hessian(sums, options)
    bare = EPMQ.problem(LayerWeights("layer", weight_of(3)), sums, hessian, options)
    biased = LayerWeights("layer", weight_of(3), bias_of(2))
    first = EPMQ.problem(biased, sums, hessian, options)
    second = EPMQ.problem(biased, sums, hessian, options)
    assert bare.hessian is hessian.plain
    assert first.hessian is second.hessian is hessian.centred
    assert first.hessian.factor is second.hessian.factor


def test_presets_differ_and_single_options_win_over_them() -> None:
    assert EPMQ.calibration(EpmqOptions(**EXACT, preset="paper")).mix == 0
    assert EPMQ.calibration(EpmqOptions(**EXACT, preset="features")).mix == 0.25
    options = EpmqOptions(**EXACT, preset="features", rho=1.5)
    assert (options.values.rho, options.values.alpha) == (1.5, 0.25)


def test_one_expert_without_anchor_is_the_expert() -> None:
    options = EpmqOptions(**EXACT, preset="paper", anchor=1e-12)
    sums = epmq_sums([inputs_of(1)], [weight_of(2)], options)
    problem = EPMQ.problem(
        LayerWeights("layer", weight_of(3)), sums, EPMQ.hessian(sums, options), options
    )
    assert torch.allclose(problem.weight, weight_of(2).double(), atol=1e-6)


def test_a_heavy_anchor_is_the_merged_model_rounded() -> None:
    options = EpmqOptions(**EXACT, preset="paper", anchor=1e9, group_size=16, refine=0)
    merged = weight_of(3)
    sums = epmq_sums([inputs_of(1)], [weight_of(2)], options)
    problem = EPMQ.problem(
        LayerWeights("layer", merged), sums, EPMQ.hessian(sums, options), options
    )
    assert torch.allclose(problem.weight, merged.double(), atol=1e-6)
    done = quantize_layer("layer", None, problem, sums, options)
    assert done.report.error_after == pytest.approx(done.report.error_before, rel=1e-3)


def test_dead_inputs_keep_the_anchor_s_value() -> None:
    options = EpmqOptions(**EXACT, preset="paper")
    features = inputs_of(1)
    features[:, 5] = 0
    sums = epmq_sums([features], [weight_of(2)], options)
    problem = EPMQ.problem(
        LayerWeights("layer", weight_of(3)), sums, EPMQ.hessian(sums, options), options
    )
    assert torch.allclose(problem.weight[:, 5], weight_of(3)[:, 5].double(), atol=1e-9)


def test_statistics_are_means_over_tokens_whatever_the_batches() -> None:
    features = inputs_of(1, tokens=50)
    whole = statistics_of(features)
    accumulator = Accumulator()
    for part in (features[:7], features[7:48], features[48:]):
        accumulator.add(part)
    parts = accumulator.statistics()
    assert parts.tokens == 50
    # Products are float32.
    assert torch.allclose(parts.gram, whole.gram, rtol=1e-5, atol=1e-4)
    assert torch.allclose(whole.gram, features.T @ features / 50, atol=1e-4)
    assert torch.allclose(parts.mean, features.mean(dim=0).double(), rtol=1e-4, atol=1e-6)


def test_refitted_bias_undoes_the_mean_shift() -> None:
    options = GptqOptions(bits=2, group_size=16)
    features, merged = inputs_of(1), weight_of(2)
    bias = torch.randn(ROWS, generator=torch.Generator().manual_seed(9))
    sums = GroupSums.zeros(COLUMNS, torch.device("cpu"))
    sums.add(statistics_of(features), 1.0)
    problem = GPTQ.problem(
        LayerWeights("layer", merged), sums, GPTQ.hessian(sums, options), options
    )
    done = quantize_layer("layer", bias, problem, sums, options)
    assert done.bias is not None
    target = (features @ merged.T + bias).mean(dim=0)
    shifted = (features @ done.linear.dequantize().T + bias).mean(dim=0)
    refitted = (features @ done.linear.dequantize().T + done.bias).mean(dim=0)
    assert (shifted - target).abs().max() > 0.05
    assert torch.allclose(refitted, target, atol=1e-4)


def test_undamped_dead_inputs_do_not_spoil_the_layer() -> None:
    options = GptqOptions(damping=0, group_size=16)
    features = inputs_of(1)
    features[:, 5] = 0
    sums = GroupSums.zeros(COLUMNS, torch.device("cpu"))
    sums.add(statistics_of(features), 1.0)
    problem = GPTQ.problem(
        LayerWeights("layer", weight_of(2)), sums, GPTQ.hessian(sums, options), options
    )
    report = quantize_layer("layer", None, problem, sums, options).report
    assert report.status == "damping_raised"
    assert report.error_after < report.error_before


def test_a_task_without_any_activation_is_left_out() -> None:
    options = EpmqOptions(**EXACT, preset="paper")
    inputs = [inputs_of(1), torch.zeros(10, COLUMNS)]
    both = epmq_sums(inputs, [weight_of(2), weight_of(3)], options)
    alone = epmq_sums(inputs[:1], [weight_of(2)], options)
    assert torch.equal(both.gram, alone.gram)
    assert both.weight == alone.weight


def test_a_method_that_needs_experts_says_so_where_there_are_none() -> None:
    with pytest.raises(ValueError, match=r"^quantization method epmq needs base and experts$"):
        EPMQ.expert_source(torch.nn.Linear(1, 1), None)
    assert GPTQ.expert_source(torch.nn.Linear(1, 1), None) is None
