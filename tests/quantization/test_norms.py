"""Re-fitting LayerNorms."""

import pytest
import torch
from torch import nn

from epmq_deploy.models.norms import pre_affine
from epmq_deploy.quantization.norms import NormSums, fit_affine

CHANNELS = 5


def tokens(seed: int, count: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, CHANNELS, generator=generator, dtype=torch.float64) + 0.3


@pytest.mark.parametrize("damping", [1e-6, 0.05, 2.0])
def test_equals_ridge_regression_channel_by_channel(damping: float) -> None:
    first, second = tokens(1), tokens(2)
    wanted_first, wanted_second = tokens(3), tokens(4)
    gain, bias = tokens(5, 1)[0], tokens(6, 1)[0]
    sums = NormSums.zeros(CHANNELS, torch.device("cpu"))
    sums.add(first, wanted_first, torch.ones(40))
    sums.add(second, wanted_second, torch.full((40,), 3.0))
    fitted = fit_affine(sums, gain, bias, damping)
    for channel in range(CHANNELS):
        # Ridge as ordinary least squares with two more rows that pull towards the anchor.
        n = torch.cat([first[:, channel], second[:, channel]])
        y = torch.cat([wanted_first[:, channel], wanted_second[:, channel]])
        share = torch.cat([torch.ones(40), 3 * torch.ones(40)]).double() / 160
        rows = torch.stack([n, torch.ones_like(n)], dim=1) * share.sqrt()[:, None]
        pull = damping**0.5 * torch.eye(2, dtype=torch.float64)
        anchor = torch.stack([gain[channel], bias[channel]])
        left = torch.cat([rows, pull])
        right = torch.cat([y * share.sqrt(), damping**0.5 * anchor])
        solution = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
        assert fitted[0][channel].item() == pytest.approx(solution[0].item(), rel=1e-5)
        assert fitted[1][channel].item() == pytest.approx(solution[1].item(), rel=1e-5)


def test_a_reachable_target_is_reached_and_the_error_is_the_stated_one() -> None:
    gain, bias = tokens(5, 1)[0], tokens(6, 1)[0]
    activations = tokens(1)
    sums = NormSums.zeros(CHANNELS, torch.device("cpu"))
    sums.add(activations, gain * activations + bias, torch.ones(40))
    start = torch.ones(CHANNELS), torch.zeros(CHANNELS)
    fitted = fit_affine(sums, *start, damping=1e-12)
    assert torch.allclose(fitted[0].double(), gain, atol=1e-6)
    assert torch.allclose(fitted[1].double(), bias, atol=1e-6)
    miss = (activations - gain * activations - bias).square().sum()
    total = (gain * activations + bias).square().sum()
    assert sums.error(*start) == pytest.approx(float(miss / total))
    assert sums.error(*fitted) < 1e-10


def test_heavy_damping_keeps_the_anchor() -> None:
    gain, bias = tokens(5, 1)[0], tokens(6, 1)[0]
    sums = NormSums.zeros(CHANNELS, torch.device("cpu"))
    sums.add(tokens(1), tokens(2), torch.ones(40))
    fitted = fit_affine(sums, gain, bias, damping=1e9)
    assert torch.allclose(fitted[0].double(), gain, atol=1e-6)
    assert torch.allclose(fitted[1].double(), bias, atol=1e-6)


def test_pre_affine_is_what_the_norm_scales_and_shifts() -> None:
    norm = nn.LayerNorm(CHANNELS, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    inputs = tokens(1).float()
    assert torch.allclose(norm(inputs), norm.weight * pre_affine(norm, inputs) + norm.bias)
