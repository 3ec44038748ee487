"""Statistics of layer inputs, against plain sums over tokens."""

import pytest
import torch
from torch import Tensor

from epmq_deploy.calibration import statistics as module
from epmq_deploy.calibration.statistics import Accumulator, GroupSums
from epmq_deploy.errors import NumericsError
from epmq_deploy.models.tokens import TokenWeights
from epmq_deploy.quantization.layer import layer_inputs

B, T, K, N = 3, 4, 10, 6


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tile", [3, 5, 100])
def test_tiles_make_no_difference(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE", tile)
    accumulator = Accumulator()
    batches = [normal(1, B, T, K), normal(2, 1, T, K)]
    for batch in batches:
        accumulator.add(batch)
    statistics = accumulator.statistics()
    rows = torch.cat([batch.reshape(-1, K) for batch in batches]).double()
    assert torch.allclose(statistics.gram.double(), rows.T @ rows / len(rows), atol=1e-6)
    assert torch.equal(statistics.gram, statistics.gram.T)
    assert torch.allclose(statistics.mean, rows.mean(dim=0), atol=1e-6)
    assert statistics.tokens == len(rows)


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_weighted_tokens_and_wanted_outputs(mix: float) -> None:
    """Padding counts for nothing, tokens that no head reads for a tenth."""
    x, own, weight = normal(1, B, T, K), normal(2, B, T, N), normal(3, N, K)
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    tokens = TokenWeights(real, pooled=torch.tensor([0, 1, 0]))
    weights = tokens.weights(x.shape, 0.1, x.device)
    accumulator = Accumulator()
    accumulator.add(x, weights, {"layer": weight}, {"layer": own}, mix)
    statistics = accumulator.statistics()
    share = torch.tensor([[1, 0.1, 0.1, 0.1], [0.1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.float64)
    share /= share.sum()
    target = ((1 - mix) * x @ weight.T + mix * own).double()
    gram = torch.einsum("bt,bti,btj->ij", share, x.double(), x.double())
    cross = torch.einsum("bt,bti,btj->ij", share, target, x.double())
    assert torch.allclose(statistics.gram.double(), gram, atol=1e-6)
    assert torch.allclose(statistics.cross["layer"].double(), cross, atol=1e-5)
    assert torch.allclose(statistics.mean, torch.einsum("bt,bti->i", share, x.double()), atol=1e-6)
    mean = torch.einsum("bt,bti->i", share, target)
    assert torch.allclose(statistics.output_mean["layer"], mean, atol=1e-5)
    assert statistics.tokens == 7


def test_nothing_to_weigh_needs_no_weights() -> None:
    shape = torch.Size([B, T, K])
    pooled = TokenWeights(pooled=torch.zeros(B, dtype=torch.int64))
    assert TokenWeights().weights(shape, 0.1, torch.device("cpu")) is None
    assert pooled.weights(shape, 1.0, torch.device("cpu")) is None


def test_bfloat16_products_are_those_of_rounded_activations() -> None:
    x, weight = normal(1, 50, K), normal(3, N, K)
    exact, rounded = Accumulator(), Accumulator(torch.bfloat16)
    for accumulator in (exact, rounded):
        accumulator.add(x, None, {"layer": weight})
    first, second = exact.statistics(), rounded.statistics()
    for one, other in ((first.gram, second.gram), (first.cross["layer"], second.cross["layer"])):
        error = (one - other).norm() / one.norm()
        assert 0 < error < 0.01
    assert torch.equal(second.gram, second.gram.T)


def test_biases_of_all_tasks_meet_their_own_means() -> None:
    sums = GroupSums.zeros(K, torch.device("cpu"))
    expected = torch.zeros(N, K, dtype=torch.float64)
    for task in range(3):
        accumulator = Accumulator()
        accumulator.add(normal(task, 20, K), None, {"layer": normal(10 + task, N, K)})
        statistics, bias = accumulator.statistics(), normal(20 + task, N)
        sums.add(statistics, 0.5 + task, {"layer": bias})
        expected += (0.5 + task) * torch.outer(bias.double(), statistics.mean)
    assert torch.allclose(sums.bias_cross("layer"), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(value: float) -> None:
    x = normal(1, 5, K)
    x[2, 3] = value
    accumulator = Accumulator()
    accumulator.add(x)
    with pytest.raises(NumericsError, match="NaN or infinite"):
        accumulator.statistics()


def test_no_tokens_at_all_are_refused() -> None:
    accumulator = Accumulator()
    with pytest.raises(NumericsError, match="no calibration tokens"):
        accumulator.statistics()
    accumulator.add(normal(1, B, T, K), torch.zeros(B, T))
    with pytest.raises(NumericsError, match="no calibration tokens"):
        accumulator.statistics()


def test_ranges_and_outputs_of_a_layer() -> None:
    """Padding widens the range, because it is quantized too, and counts for nothing else."""
    weight = normal(7, N, K)
    sums = GroupSums.zeros(K, torch.device("cpu"))
    batches, total, squares = [], torch.zeros(()), torch.zeros(K)
    for task in range(2):
        accumulator = Accumulator()
        x = normal(10 + task, B, T, K)
        x[0, -1] *= 10
        real = torch.ones(B, T, dtype=torch.bool)
        real[0, -1] = False
        accumulator.add(x, TokenWeights(real).weights(x.shape, 1.0, x.device))
        sums.add(accumulator.statistics(), 1.0 + task)
        rows = x[real]
        total += (1 + task) * (rows @ weight.T).square().sum(dim=1).mean()
        squares += (1 + task) * rows.square().mean(dim=0)
        batches.append(x.reshape(-1, K))
    seen = layer_inputs(sums, weight)
    assert seen is not None
    assert torch.equal(seen.low, torch.cat(batches).amin(dim=0))
    assert torch.equal(seen.high, torch.cat(batches).amax(dim=0))
    assert torch.allclose(seen.square, squares / 3, atol=1e-6)
    assert seen.output == pytest.approx(float(total / 3), rel=1e-5)


def test_nothing_is_known_without_activations() -> None:
    assert layer_inputs(GroupSums.zeros(K, torch.device("cpu")), normal(1, N, K)) is None
