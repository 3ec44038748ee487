"""Settling options that depend on the model: the anchor's strength and bits per layer."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epmq_deploy.data.agreement import Judge, Scores, mean_divergence
from epmq_deploy.data.samples import Samples, batches
from epmq_deploy.errors import RecipeError
from epmq_deploy.models import ModelFamily, TaskHead
from epmq_deploy.models.experts import ExpertBackbone
from epmq_deploy.options.quantization import LayerOptions, QuantizeOptions
from epmq_deploy.progress import Progress
from epmq_deploy.quantization.allocation import Choice, allocate
from epmq_deploy.quantization.anchor_search import search_anchor
from epmq_deploy.quantization.bit_budget import BitBudget, bit_budget
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.methods.epmq import EpmqOptions
from epmq_deploy.quantization.results import QuantizedModel
from epmq_deploy.quantization.sequential import quantize_model

log = logging.getLogger(__name__)

# Of every four samples of a task, three calibrate and one scores while the anchor is searched for.
_HELD_BACK = 4


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


def plan_anchor(
    options: EpmqOptions, place: CalibrationContext, heads: Mapping[str, TaskHead]
) -> dict[str, Any]:
    """Search the anchor's strength; plain data with ``anchor`` and how it was found.

    Raises:
        RecipeError: there is nothing to search on.
    """
    few = [task for task, chosen in place.samples.items() if len(chosen) < 2 * _HELD_BACK]
    if few or not place.samples:
        raise RecipeError(
            f"quantize.anchor: auto needs at least {2 * _HELD_BACK} calibration samples for every "
            "task; give a number instead"
        )
    held, fitted = {}, {}
    for task, chosen in place.samples.items():
        count = len(chosen) // _HELD_BACK
        held[task] = replace(chosen, indices=chosen.indices[:count])
        fitted[task] = replace(chosen, indices=chosen.indices[count:])
    part = replace(place, samples=fitted)
    judge = place.judge(held, heads)

    def score(strength: float) -> Scores:
        trial = options.model_copy(update={"anchor": strength})
        model, _ = part.calibrate(trial, rounding=False)
        found = judge.scores(model)
        log.info("anchor %g: divergence from the experts %.4f", strength, mean_divergence(found))
        return found

    search = search_anchor(score, options.values.anchor)
    return {
        "anchor": search.value,
        "curve": [[strength, mean] for strength, mean in search.curve.items()],
        "standard_error": search.standard_error,
    }


def plan_bits(options: QuantizeOptions, place: CalibrationContext) -> dict[str, Any]:
    """Choose bits per layer for ``target_bits`` or ``target_size``; plain data with ``layers``.

    Layers that have bits of their own keep them, and count.

    Raises:
        RecipeError: see ``bit_budget``.
    """
    budget = place.bit_budget(options)
    _, result = place.calibrate(options, rounding=False, probe=budget.choices)
    chosen = allocate(
        {
            name: Choice(result.errors.get(name, dict.fromkeys(sizes, 0.0)), sizes)
            for name, sizes in budget.sizes.items()
        },
        budget.bits,
    )
    bits = sum(width * budget.weights[name] for name, width in chosen.items())
    return {"layers": chosen, "mean_bits": bits / sum(budget.weights.values())}


def with_bits(options: QuantizeOptions, bits: Mapping[str, int]) -> QuantizeOptions:
    """Options in which each layer has the bits given."""
    chosen = {
        name: options.layers.get(name, LayerOptions()).model_copy(update={"bits": width})
        for name, width in bits.items()
    }
    return options.model_copy(update={"layers": {**options.layers, **chosen}})
