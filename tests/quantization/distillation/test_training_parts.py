"""Batches that are the same whenever asked for, the schedule, and activation checkpointing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_zoo import TASKS, TinyZoo

from epmq_deploy.data.loading import load_samples
from epmq_deploy.data.samples import Samples
from epmq_deploy.models import family_of
from epmq_deploy.quantization.distillation.augmentation import Augmentation
from epmq_deploy.quantization.distillation.checkpointing import checkpointed
from epmq_deploy.quantization.distillation.epoch_batches import EpochBatches
from epmq_deploy.quantization.distillation.schedule import rate_at
from epmq_deploy.recipe import load_recipe


def samples_of(tiny: TinyZoo, count: int) -> tuple[Samples, Path]:
    recipe = load_recipe(tiny.recipe)
    source = recipe.tasks[TASKS[0]].calibration
    assert source is not None
    folder = Path(recipe.base.path)
    return load_samples(TASKS[0], source, family_of(folder), limit=count), folder


@pytest.mark.parametrize(("samples", "count"), [(24, 5), (24, 24), (3, 5)])
def test_an_epoch_shows_every_sample_once_and_the_same_again(
    tiny: TinyZoo, samples: int, count: int
) -> None:
    chosen, folder = samples_of(tiny, samples)
    family = family_of(folder)
    plain = EpochBatches(chosen, family, folder, Augmentation(), count, seed=0)
    (everything,) = family.collate(folder, chosen.inputs(0, samples))

    def order(epoch: int) -> list[int]:
        shown = torch.cat([batch[0] for batch in plain.of_epoch(epoch)])
        matches = (shown[:, None] == everything[None]).flatten(2).all(dim=2)
        return [int(row.nonzero()[0]) for row in matches]

    assert sorted(order(0)) == list(range(samples))
    assert order(0) == order(0)
    assert len({tuple(order(epoch)) for epoch in range(8)}) > 1
    sizes = [stop - start for start, stop in plain.bounds()]
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= 1
    changed = replace(plain, augmentation=Augmentation("image"))
    first, again = (torch.cat([b[0] for b in changed.of_epoch(0)]) for _ in range(2))
    assert torch.equal(first, again)
    other = torch.cat([b[0] for b in replace(changed, seed=1).of_epoch(0)])
    assert not torch.equal(first, other)


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [rate_at(step, 100, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == 2.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.01
    assert rate_at(0, 1, 2.0) == 2.0


def test_checkpointing_changes_no_gradient(tiny: TinyZoo) -> None:
    samples, folder = samples_of(tiny, 4)
    family = family_of(folder)
    model = family.load(folder)
    blocks = family.blocks(model)
    runs = []
    model.get_submodule(blocks[0].name).register_forward_hook(lambda *_: runs.append(1))
    inputs = family.collate(folder, samples.inputs(0, 4))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        family.embed(model, *inputs).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.requires_grad_(True)
    plain = gradients()
    with checkpointed(model, blocks):
        assert "forward" in vars(model.get_submodule(blocks[0].name))
        saved = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))
    assert all("forward" not in vars(model.get_submodule(block.name)) for block in blocks)
