"""What quantization of one merged model runs on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epmq_deploy.data.agreement import Judge
from epmq_deploy.data.samples import Samples, batches
from epmq_deploy.models import ModelFamily, TaskHead
from epmq_deploy.models.experts import ExpertBackbone
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.progress import Progress
from epmq_deploy.quantization.bit_budget import BitBudget, bit_budget
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.results import QuantizedModel
from epmq_deploy.quantization.sequential import quantize_model


@dataclass(frozen=True)
class CalibrationContext:
    """What a calibration runs on.

    Attributes:
        family: the models' family.
        folder: the merged model.
        samples: calibration samples by task.
        experts: base and experts, where the method needs them.
        device: where to run.
        progress: shows long work.
        scratch: folder for activations on disk; the system's temporary folder when absent.
        expert_heads: of tasks whose experts predict through other heads than the merged model.
    """

    family: ModelFamily
    folder: Path
    samples: Mapping[str, Samples]
    experts: ExpertBackbone | None
    device: torch.device
    progress: Progress | None = None
    scratch: Path | None = None
    expert_heads: Mapping[str, TaskHead] = field(default_factory=dict)

    def bit_budget(self, options: QuantizeOptions) -> BitBudget:
        """See there; the model is in memory no longer than this takes."""
        model = self.family.load(self.folder)
        return bit_budget(model, self.family.blocks(model), options)

    def judge(self, samples: Mapping[str, Samples], heads: Mapping[str, TaskHead]) -> Judge:
        """Judges models with these heads by the experts' predictions on these samples."""
        assert self.experts is not None, "guided targets are given experts"
        own = {**heads, **self.expert_heads}
        become = self.experts.become
        return Judge.of_experts(self.family, self.folder, samples, heads, become, own)

    def calibrate(self, options: QuantizeOptions, **how: Any) -> tuple[nn.Module, QuantizedModel]:
        """The merged model after ``quantize_model`` with these options, and its result."""
        model = self.family.load(self.folder).to(self.device)
        size = getattr(options, "batch_size", 1)
        result = quantize_model(
            model,
            self.family,
            QUANTIZATION_METHODS[options.method],
            options,
            batches={
                task: partial(batches, chosen, self.family, self.folder, size)
                for task, chosen in self.samples.items()
            },
            experts=self.experts,
            progress=self.progress,
            scratch=self.scratch,
            **how,
        )
        return model, result
