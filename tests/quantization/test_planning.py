"""Bits under a budget, and the search for the anchor's strength."""

import itertools

import pytest
import torch
from torch import Tensor

from epmq_deploy.data.agreement import standard_error
from epmq_deploy.models.problem_types import divergence
from epmq_deploy.quantization.bit_budget import stored_bits
from epmq_deploy.quantization.planning import Choice, allocate, search_anchor


def choices(seed: int, layers: int = 5) -> dict[str, Choice]:
    """Layers of several sizes whose errors fall about fourfold per bit, as rounding's do."""
    generator = torch.Generator().manual_seed(seed)
    choices = {}
    for index in range(layers):
        scale, weights = torch.rand(2, generator=generator).tolist()
        sizes = {bits: (1 + round(9 * weights)) * bits * 100.0 for bits in (2, 3, 4, 8)}
        errors = {bits: (0.1 + scale) * 4.0**-bits for bits in sizes}
        choices[f"layer{index}"] = Choice(errors, sizes)
    return choices


def total(layers: dict[str, Choice], chosen: dict[str, int]) -> tuple[float, float]:
    error = sum(layers[name].errors[bits] for name, bits in chosen.items())
    return error, sum(layers[name].sizes[bits] for name, bits in chosen.items())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits", [2.5, 4.25, 6.0])
def test_close_to_the_best_of_all_allocations(seed: int, bits: float) -> None:
    layers = choices(seed)
    budget = bits * sum(choice.sizes[2] / 2 for choice in layers.values())
    error, size = total(layers, allocate(layers, budget))
    assert size <= budget
    widths = [tuple(choice.sizes) for choice in layers.values()]
    every = (dict(zip(layers, some, strict=True)) for some in itertools.product(*widths))
    best = min(pair[0] for pair in (total(layers, one) for one in every) if pair[1] <= budget)
    # Widths are discrete: one layer may miss its last step for want of budget.
    smallest = allocate(layers, sum(choice.sizes[2] for choice in layers.values()))
    assert error - best <= 0.05 * (total(layers, smallest)[0] - best)


def test_a_large_budget_buys_everything_and_a_small_one_is_refused() -> None:
    layers = choices(0)
    assert set(allocate(layers, 1e9).values()) == {8}
    with pytest.raises(ValueError, match=r"smallest widths take .* bits, more than 1$"):
        allocate(layers, 1.0)


def test_stored_size_counts_codes_scales_and_zero_points() -> None:
    assert stored_bits(3, 100, 4, 64) == 3 * (100 * 4 + 2 * (32 + 4))
    assert stored_bits(3, 100, 8, -1) == 3 * (100 * 8 + 40)


def bowl(best: float, noise: float = 0.0) -> object:
    """Scores with their least at ``best``; noise that differs between samples and strengths."""

    def score(strength: float) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(int(strength * 1e6))
        distance = torch.tensor(strength / best).log().square()
        return {"task": distance + noise * torch.randn(200, generator=generator)}

    return score


@pytest.mark.parametrize("best", [0.05, 0.2, 0.8, 3.2, 0.0125])
def test_walks_to_the_least_divergence(best: float) -> None:
    tuned = search_anchor(bowl(best), 0.05)  # type: ignore[arg-type]
    assert tuned.value == pytest.approx(best)
    assert tuned.curve[tuned.value] == pytest.approx(0, abs=1e-9)


def test_noise_alone_does_not_move_it() -> None:
    def score(strength: float) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(int(strength * 1e6))
        return {"task": torch.randn(400, generator=generator)}

    # One of five candidates beats one standard error by chance now and then; not by three.
    tuned = search_anchor(score, 0.05)
    assert abs(tuned.curve[tuned.value] - tuned.curve[0.05]) < 3 * tuned.standard_error + 1e-12


def test_divergence_is_that_of_the_distributions() -> None:
    logits, expert = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=expert),
        torch.distributions.Categorical(logits=logits),
    )
    assert torch.allclose(divergence(logits, expert), expected, atol=1e-6)
    assert torch.allclose(divergence(expert, expert + 3), torch.zeros(7), atol=1e-6)


def test_standard_error_pairs_samples() -> None:
    base = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert standard_error({"t": base}, {"t": base + 2}) == pytest.approx(0, abs=1e-6)
    difference = torch.randn(100, generator=torch.Generator().manual_seed(1))
    expected = float(difference.std()) / 10
    assert standard_error({"t": base}, {"t": base + difference}) == pytest.approx(expected)
