"""Calibration targets: the identity behind them, and their limits."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from epmq_deploy.calibration.statistics import Accumulator, GroupSums, TaskStatistics
from epmq_deploy.calibration.target import LayerWeights
from epmq_deploy.calibration.targets.epmq import TARGET as EPMQ
from epmq_deploy.calibration.targets.epmq import EpmqOptions
from epmq_deploy.calibration.targets.gptq import TARGET as GPTQ
from epmq_deploy.calibration.targets.gptq import GptqOptions
from epmq_deploy.quantization.layer import quantize_layer

ROWS, COLUMNS = 6, 24


def inputs_of(seed: int, tokens: int = 80) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator)
    return torch.randn(tokens, COLUMNS, generator=generator) @ mixing + 0.5


def weight_of(seed: int) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def statistics_of(inputs: Tensor) -> TaskStatistics:
    accumulator = Accumulator()
    accumulator.add(inputs)
    return accumulator.statistics()


def epmq_sums(
    inputs: list[Tensor],
    experts: list[Tensor],
    options: EpmqOptions,
    own: list[Tensor] | None = None,
) -> GroupSums:
    """Sums over tasks; ``own`` are the experts' own inputs, the student's when absent."""
    sums = GroupSums.zeros(COLUMNS, torch.device("cpu"))
    for features, expert, expert_features in zip(inputs, experts, own or inputs, strict=True):
        accumulator = Accumulator()
        accumulator.add(features, {"layer": expert_features @ expert.T})
        found = accumulator.statistics()
        wanted = EPMQ.expert_outputs("layer", expert, found, options)
        weight = EPMQ.task_weight(found, options)
        sums.add(found, weight, {"layer": wanted.cross}, {"layer": wanted.mean})
    return sums


@pytest.mark.parametrize("normalization", ["frobenius", "none"])
@pytest.mark.parametrize(("alpha", "rho"), [(0.0, 1.0), (0.3, 2.2), (1.0, 0.0)])
def test_stated_objective_equals_the_solver_s_up_to_a_constant(
    normalization: Literal["frobenius", "none"], alpha: float, rho: float
) -> None:
    options = EpmqOptions(anchor=0.3, alpha=alpha, rho=rho, normalization=normalization)
    inputs, own = [inputs_of(1), inputs_of(2, 50)], [inputs_of(8), inputs_of(9, 50)]
    experts, merged, base = [weight_of(3), weight_of(4)], weight_of(5), weight_of(10)
    sums = epmq_sums(inputs, experts, options, own)
    problem = EPMQ.problem(LayerWeights("layer", merged, base=base), sums, options)

    def stated(candidate: Tensor) -> float:
        anchor = rho * merged.double() + (1 - rho) * base.double()
        total = 0.3 * float((candidate - anchor).square().sum())
        for x, z, expert in zip(inputs, own, experts, strict=True):
            weight = EPMQ.task_weight(statistics_of(x), options)
            wanted = ((1 - alpha) * x.double() + alpha * z.double()) @ expert.double().T
            miss = x.double() @ candidate.T - wanted
            total += weight * float(miss.square().sum()) / len(x)
        return total

    def solved(candidate: Tensor) -> float:
        error = candidate - problem.weight
        return float(torch.trace(error @ problem.hessian @ error.T))

    first, second = weight_of(6).double(), weight_of(7).double()
    # Gram matrices are float32 products.
    assert stated(first) - stated(second) == pytest.approx(solved(first) - solved(second), rel=1e-4)


def test_presets_differ_and_single_options_win_over_them() -> None:
    assert not EPMQ.uses_features(EpmqOptions(preset="paper"))
    assert EPMQ.uses_features(EpmqOptions(preset="features"))
    options = EpmqOptions(preset="features", rho=1.5)
    assert (options.values.rho, options.values.alpha) == (1.5, 0.25)


def test_one_expert_without_anchor_is_the_expert() -> None:
    options = EpmqOptions(preset="paper", anchor=1e-12)
    sums = epmq_sums([inputs_of(1)], [weight_of(2)], options)
    problem = EPMQ.problem(LayerWeights("layer", weight_of(3)), sums, options)
    assert torch.allclose(problem.weight, weight_of(2).double(), atol=1e-4)


def test_a_heavy_anchor_is_the_merged_model_rounded() -> None:
    options = EpmqOptions(preset="paper", anchor=1e9, group_size=16, refine=0)
    merged = weight_of(3)
    sums = epmq_sums([inputs_of(1)], [weight_of(2)], options)
    problem = EPMQ.problem(LayerWeights("layer", merged), sums, options)
    assert torch.allclose(problem.weight, merged.double(), atol=1e-6)
    done = quantize_layer("layer", merged, None, problem, sums, options)
    assert done.report.error_after == pytest.approx(done.report.error_before, rel=1e-3)


def test_dead_inputs_keep_the_anchor_s_value() -> None:
    options = EpmqOptions(preset="paper")
    features = inputs_of(1)
    features[:, 5] = 0
    sums = epmq_sums([features], [weight_of(2)], options)
    problem = EPMQ.problem(LayerWeights("layer", weight_of(3)), sums, options)
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
    assert torch.allclose(whole.gram, (features.T @ features / 50).double(), atol=1e-4)
    assert torch.allclose(parts.mean, features.mean(dim=0).double(), rtol=1e-4, atol=1e-6)


def test_refitted_bias_undoes_the_mean_shift() -> None:
    options = GptqOptions(bits=2, group_size=16)
    features, merged = inputs_of(1), weight_of(2)
    bias = torch.randn(ROWS, generator=torch.Generator().manual_seed(9))
    sums = GroupSums.zeros(COLUMNS, torch.device("cpu"))
    sums.add(statistics_of(features), 1.0, {}, {})
    problem = GPTQ.problem(LayerWeights("layer", merged), sums, options)
    done = quantize_layer("layer", merged, bias, problem, sums, options)
    assert done.bias is not None
    wanted = (features @ merged.T + bias).mean(dim=0)
    shifted = (features @ done.linear.dequantize().T + bias).mean(dim=0)
    refitted = (features @ done.linear.dequantize().T + done.bias).mean(dim=0)
    assert (shifted - wanted).abs().max() > 0.05
    assert torch.allclose(refitted, wanted, atol=1e-4)


def test_undamped_dead_inputs_do_not_spoil_the_layer() -> None:
    options = GptqOptions(damping=0, group_size=16)
    features = inputs_of(1)
    features[:, 5] = 0
    sums = GroupSums.zeros(COLUMNS, torch.device("cpu"))
    sums.add(statistics_of(features), 1.0, {}, {})
    problem = GPTQ.problem(LayerWeights("layer", weight_of(2)), sums, options)
    report = quantize_layer("layer", weight_of(2), None, problem, sums, options).report
    assert report.status == "damping_raised"
    assert report.error_after < report.error_before


def test_a_task_without_any_activation_is_left_out() -> None:
    options = EpmqOptions(preset="paper")
    inputs = [inputs_of(1), torch.zeros(10, COLUMNS)]
    both = epmq_sums(inputs, [weight_of(2), weight_of(3)], options)
    alone = epmq_sums(inputs[:1], [weight_of(2)], options)
    assert torch.equal(both.gram, alone.gram)
    assert both.weight == alone.weight
