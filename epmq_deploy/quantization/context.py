"""What quantization of one merged model runs on."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

from epmq_deploy.data.agreement import Judge
from epmq_deploy.data.class_labels import HeadClasses
from epmq_deploy.data.samples import Samples, batches
from epmq_deploy.errors import RecipeError
from epmq_deploy.models import ModelFamily, TaskHead
from epmq_deploy.models.experts import ExpertBackbone
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.progress import Progress
from epmq_deploy.quantization.bit_budget import BitBudget, bit_budget
from epmq_deploy.quantization.guidance import Gradients, token_gradients
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.residuals.fitting import ResidualSettings
from epmq_deploy.quantization.residuals.layers import uncorrectable
from epmq_deploy.quantization.results import QuantizedModel
from epmq_deploy.quantization.sequential import FinishedBlocks, quantize_model

# Of a batch that tells which layers receive one row or sequence a sample.
_SAMPLES = 3


@dataclass(frozen=True)
class CalibrationContext:
    """What a calibration runs on.

    Attributes:
        family: the models' family.
        folder: the merged model.
        samples: calibration samples by task.
        experts: opens base and experts; called only where something needs them, always with the
            same result.
        device: where to run.
        progress: shows long work.
        scratch: folder for activations on disk; default: the system's temporary folder.
        heads: by task, where classifiers are compared by what they predict.
        expert_heads: of tasks whose experts predict through other heads than the merged model.
        classes: of the heads, by task.
    """

    family: ModelFamily
    folder: Path
    samples: Mapping[str, Samples]
    experts: Callable[[], ExpertBackbone]
    device: torch.device
    progress: Progress | None = None
    scratch: Path | None = None
    heads: Mapping[str, TaskHead] = field(default_factory=dict)
    expert_heads: Mapping[str, TaskHead] = field(default_factory=dict)
    classes: Mapping[str, HeadClasses] = field(default_factory=dict)

    def bit_budget(self, options: QuantizeOptions) -> BitBudget:
        """Return the budget; the model is in memory no longer than this takes.

        Raises:
            RecipeError: it cannot be met.
        """
        model = self.family.load(self.folder)
        return bit_budget(model, self.family.blocks(model), options)

    def judge(self, samples: Mapping[str, Samples]) -> Judge:
        """Return the judge of models by what experts predict on these samples."""
        return Judge.of_experts(
            self.family,
            self.folder,
            samples,
            self.heads,
            self.experts().become,
            {**self.heads, **self.expert_heads},
        )

    def calibrate(
        self,
        options: QuantizeOptions,
        *,
        rounding: bool = True,
        probe: Mapping[str, Collection[int]] | None = None,
        finished: FinishedBlocks | None = None,
        residual_rank: int = 0,
    ) -> tuple[nn.Module, QuantizedModel]:
        """Return the merged model after ``quantize_model`` with these options, and its result.

        Args:
            options: of the method.
            rounding: quantize; otherwise layers get the method's own weights, unrounded.
            probe: by layer, widths in bits at which its error is measured in addition.
            finished: results of blocks done before.
            residual_rank: of layers' corrections for every task; 0 for none.

        Raises:
            NumericsError: a layer could not be solved as asked; names it.
            RecipeError: corrections are asked for, and no layer can have any.
        """
        model = self.family.load(self.folder).to(self.device)
        method = QUANTIZATION_METHODS[options.method]
        settings = method.calibration(options)
        gradients = self._gradients(model, settings.batch_size) if settings.guidance else None
        result = quantize_model(
            model,
            self.family,
            method,
            options,
            batches={
                task: partial(batches, samples, self.family, self.folder, settings.batch_size)
                for task, samples in self.samples.items()
            },
            experts=self.experts() if method.uses_experts else None,
            rounding=rounding,
            probe=probe,
            finished=finished,
            progress=self.progress,
            scratch=self.scratch,
            gradients=gradients,
            residuals=self._residual_settings(model, residual_rank),
        )
        return model, result

    def _gradients(self, model: nn.Module, batch_size: int) -> Gradients:
        """Return the gradients of all samples in the merged model, computed once."""
        known = self._gradients_by_batch_size
        if batch_size not in known:
            judge, blocks = self.judge(self.samples), self.family.blocks(model)
            known[batch_size] = {
                task: token_gradients(
                    model,
                    blocks,
                    judge,
                    task,
                    batches(samples, self.family, self.folder, batch_size),
                )
                for task, samples in self.samples.items()
            }
        return known[batch_size]

    @cached_property
    def _gradients_by_batch_size(self) -> dict[int, Gradients]:
        return {}

    def uncorrectable(self, model: nn.Module) -> dict[str, str]:
        """Return the layers that a sample's task cannot correct, with the reason."""
        inputs = [
            value.to(self.device) for value in self.family.example_inputs(self.folder, _SAMPLES)
        ]
        layers = [name for block in self.family.blocks(model) for name in block.layers]
        return uncorrectable(
            model, layers, lambda: self.family.embed(model, *inputs), len(inputs[0])
        )

    def _residual_settings(self, model: nn.Module, rank: int) -> ResidualSettings | None:
        if not rank:
            return None
        without = self.uncorrectable(model)
        layers = {name for block in self.family.blocks(model) for name in block.layers}
        if not layers - without.keys():
            raise RecipeError(
                "quantize.residual_rank: no layer of this model can be corrected sample by sample; "
                "leave it out",
                options={"quantize.residual_rank": None},
            )
        return ResidualSettings(rank, layers - without.keys())
