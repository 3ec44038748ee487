"""The batches of one task in one epoch: shuffled, augmented, and the same whenever asked for."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from epmq_deploy.data.samples import Samples, check_finite
from epmq_deploy.models import ModelFamily
from epmq_deploy.quantization.distillation.augmentation import Augmentation


@dataclass(frozen=True)
class EpochBatches:
    """Yields model inputs of one task.

    The expert is asked before the student is trained, one expert after the other, so both must be
    shown the same: what is random depends on seed, epoch and task alone.

    Attributes:
        samples: of the task.
        family: collates them.
        folder: a model folder with preprocessor settings.
        augmentation: of the task.
        count: of batches; all tasks have as many, so that one step takes one of each.
        seed: of the run.
    """

    samples: Samples
    family: ModelFamily
    folder: Path
    augmentation: Augmentation
    count: int
    seed: int

    def of_epoch(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batches of an epoch; none is empty, and their sizes differ by one at most."""
        digest = hashlib.sha256(f"{self.seed} {epoch} {self.samples.task}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order = torch.randperm(len(self.samples), generator=generator).tolist()
        shuffled = replace(self.samples, indices=[self.samples.indices[row] for row in order])
        for start, stop in self.bounds():
            raw = self.augmentation.of_samples(shuffled.inputs(start, stop), generator)
            folder = self.samples.inputs_folder or self.folder
            inputs = self.family.collate(folder, raw)
            check_finite(shuffled, start, inputs)
            yield self.augmentation.of_inputs(inputs, generator)

    def bounds(self) -> list[tuple[int, int]]:
        """Return first and last-plus-one sample of each batch that has any."""
        edges = [index * len(self.samples) // self.count for index in range(self.count + 1)]
        return [(start, stop) for start, stop in pairwise(edges) if stop > start]
