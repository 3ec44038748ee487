"""What experts' layers and norms give for the calibration samples, recorded block by block."""

from collections.abc import Mapping, Sequence

import torch

from epmq_deploy.calibration.activations import record
from epmq_deploy.calibration.block_runner import BlockRunner, ModuleSource
from epmq_deploy.calibration.cache import ActivationCache, CachedTensor
from epmq_deploy.models import Block
from epmq_deploy.models.modules import linear_layer
from epmq_deploy.quantization.base import CalibrationSettings

# By task, batch by batch: outputs by the name of a layer (without bias) or norm (without gain and
# bias). Empty for tasks whose expert does not run along.
Features = Mapping[str, Sequence[Mapping[str, CachedTensor]]]


class ExpertRecorder:
    """Runs each expert's blocks on its task's batches and records what their layers give.

    Args:
        runner: holds the batches.
        experts: where their blocks come from; None where no expert runs along.
        cache: keeps the records.
        settings: of the method.
    """

    def __init__(
        self,
        runner: BlockRunner,
        experts: ModuleSource | None,
        cache: ActivationCache,
        settings: CalibrationSettings,
    ) -> None:
        self._runner = runner
        self._experts = experts
        self._cache = cache
        self._dtype = settings.cache_dtype
        # Products would round layers' outputs to this anyway.
        self._layer_dtype = torch.bfloat16 if settings.products == torch.bfloat16 else None

    def record(self, block: Block, layers: Sequence[str], norms: Sequence[str]) -> Features:
        """Take every expert's batches through its block, and keep what these modules give.

        Args:
            block: where the batches are.
            layers: dotted names of linear layers in it.
            norms: dotted names of norms in it.
        """
        return {task: self._of_task(task, block, layers, norms) for task in self._runner.batches}

    def _of_task(
        self, task: str, block: Block, layers: Sequence[str], norms: Sequence[str]
    ) -> list[dict[str, CachedTensor]]:
        batches = [batch.expert for batch in self._runner.batches[task] if batch.expert is not None]
        if self._experts is None or not batches:
            return []
        module = self._experts.module(task, block.name)
        repeated = {name for group in block.groups if group.runs > 1 for name in group.layers}
        return [
            record(
                module,
                batch,
                {name: linear_layer(module, block.inner(name)) for name in layers},
                {name: module.get_submodule(block.inner(name)) for name in norms},
                self._cache,
                self._dtype,
                self._layer_dtype,
                block.passes_on,
                repeated,
            )
            for batch in batches
        ]
