"""Merging linear layers in the directions in which each expert changes their outputs (ESM).

The order is that of the authors' code: tasks and columns are polarized before both sides are made
orthonormal, layers of one kind afterwards.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from epmq_deploy.calibration.block_runner import BlockRunner
from epmq_deploy.merging.base import Calibrated, CalibrationData, TaskVectors
from epmq_deploy.merging.layer_inputs import input_grams, runner_of
from epmq_deploy.merging.ops.essential import (
    EssentialFactors,
    essential_factors,
    merge_essential,
    polarized,
)
from epmq_deploy.models import Block
from epmq_deploy.options.merging import PolarizedOptions


def merge_essential_layers(
    data: CalibrationData, vectors: TaskVectors, options: PolarizedOptions
) -> Calibrated[dict[str, Tensor]]:
    """Return merged task vectors of all linear layers in blocks, by tensor name.

    One block of one expert, one task's Gram matrices and all tasks' factors of one block are in
    memory at a time, in addition to the result and the activations.
    """
    model = data.backbone()
    blocks = data.family.blocks(model)
    runner = runner_of(data, model, blocks, options)
    merged: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    for block in data.progress.track(blocks, "merging blocks"):
        runner.enter(block)
        of_block = _merge_block(block, runner, data, vectors, options)
        kinds |= {name: name.removeprefix(block.name) for name in of_block}
        merged |= of_block
    powers = {name: options.for_tensor(name).polarization for name in merged}
    return Calibrated(polarize_layers(merged, kinds, powers))


def polarize_layers(
    merged: Mapping[str, Tensor], kinds: Mapping[str, str], powers: Mapping[str, float]
) -> dict[str, Tensor]:
    """Enlarge the larger task vectors among layers of one kind and reduce the smaller ones.

    Args:
        merged: merged task vectors by tensor name.
        kinds: by tensor name; layers of one kind have one place in their blocks.
        powers: of the relative norms, by tensor name.
    """
    by_kind: defaultdict[str, list[str]] = defaultdict(list)
    for name in merged:
        by_kind[kinds[name]].append(name)
    result = {}
    for names in by_kind.values():
        norms = torch.stack([torch.linalg.vector_norm(merged[name]) for name in names])
        for index, name in enumerate(names):
            result[name] = merged[name] * polarized(norms, powers[name])[index]
    return result


def _merge_block(
    block: Block,
    runner: BlockRunner,
    data: CalibrationData,
    vectors: TaskVectors,
    options: PolarizedOptions,
) -> dict[str, Tensor]:
    """Return merged task vectors of a block's linear layers; batches go on to the next block."""
    merged_names = set(vectors.names)
    groups = [
        [name for layer in group.layers if (name := f"{layer}.weight") in merged_names]
        for group in block.groups
    ]
    factors: defaultdict[str, list[EssentialFactors]] = defaultdict(list)
    for index, task in enumerate(data.tasks):
        grams = input_grams(runner, data, task, block)
        for names, gram in zip(groups, grams, strict=True):
            for name, vector in zip(names, vectors.of_task(index, names), strict=True):
                rank = max(1, len(vector) // len(data.tasks))
                factors[name].append(essential_factors(vector, gram, rank))
    return {
        name: merge_essential(of_layer, options.for_tensor(name).polarization)
        for name, of_layer in factors.items()
    }
