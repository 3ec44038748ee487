"""Task matrices in essential directions: what holds for the pure functions."""

import torch

from epmq_deploy.merging.essential import polarize_layers
from epmq_deploy.merging.ops.essential import essential_factors, merge_essential, polarized


def test_directions_are_ordered_by_what_they_change_not_by_size() -> None:
    vector = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    # Inputs along the last axis are a hundred times larger than along the others.
    gram = torch.diag(torch.tensor([1.0, 1.0, 1e4]))
    factors = essential_factors(vector, gram, 2)
    assert torch.allclose(
        factors.left.abs() / factors.left.abs().max(dim=0).values,
        torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]),
    )
    assert abs(factors.norm - 14**0.5) < 1e-6
    scales = torch.tensor([1e4, 9.0]).pow(0.15)
    assert torch.allclose(torch.linalg.vector_norm(factors.left, dim=0), scales / scales.mean())


def test_a_factor_on_the_inputs_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    vector, rows = torch.randn(4, 6, generator=generator), torch.randn(50, 6, generator=generator)
    one, other = (essential_factors(vector, factor * rows.T @ rows, 2) for factor in (1.0, 1e-3))
    assert torch.allclose(one.left @ one.right, other.left @ other.right, atol=1e-4)


def test_experts_that_change_nothing_take_no_part() -> None:
    generator = torch.Generator().manual_seed(0)
    vector, gram = torch.randn(4, 6, generator=generator), torch.eye(6)
    nothing = essential_factors(torch.zeros(4, 6), gram, 2)
    some = essential_factors(vector, gram, 2)
    merged = merge_essential([some, nothing], 2.0)
    # Of the rank of one expert's factors, in its own directions.
    assert int(torch.linalg.matrix_rank(merged, rtol=1e-4)) == 2
    outside = merged - some.left @ torch.linalg.pinv(some.left) @ merged
    assert float(outside.abs().max()) < 1e-5
    assert not merge_essential([nothing, nothing], 2.0).any()


def test_polarizing_keeps_equal_sizes_and_widens_differences() -> None:
    assert torch.allclose(polarized(torch.full((3,), 5.0), 2.0), torch.ones(3))
    assert torch.allclose(polarized(torch.tensor([1.0, 3.0]), 2.0), torch.tensor([0.25, 2.25]))
    assert torch.equal(polarized(torch.tensor([1.0, 3.0]), 0.0), torch.ones(2))
    assert torch.equal(polarized(torch.zeros(2), 2.0), torch.ones(2))


def test_layers_are_polarized_among_their_kind() -> None:
    merged = {"0.a": torch.ones(4), "1.a": 3 * torch.ones(4), "0.b": 7 * torch.ones(2, 2)}
    kinds = {"0.a": ".a", "1.a": ".a", "0.b": ".b"}
    found = polarize_layers(merged, kinds, dict.fromkeys(merged, 2.0) | {"1.a": 0.0})
    assert torch.allclose(found["0.a"], 0.25 * merged["0.a"])
    assert torch.allclose(found["1.a"], merged["1.a"])
    assert torch.allclose(found["0.b"], merged["0.b"])
