"""Fitting the corrections of layers, group by group, while a model is quantized."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from epmq_deploy.calibration.cache import ActivationCache, CachedTensor
from epmq_deploy.calibration.statistics import TaskStatistics
from epmq_deploy.models.modules import linear_layer
from epmq_deploy.quantization.expert_source import ExpertWeights
from epmq_deploy.quantization.residuals.factors import LayerResiduals, ModelResiduals, stacked
from epmq_deploy.quantization.residuals.fit import TaskMoments, fit_correction
from epmq_deploy.quantization.residuals.student import TaskStudents

# Chosen on held-back calibration samples, on which a quarter and twice of it did as well.
DAMPING = 0.02


@dataclass(frozen=True)
class ResidualSettings:
    """How corrections are fitted.

    Attributes:
        rank: of every layer's correction, as far as the layer has so many.
        layers: dotted names of those that are corrected.
        damping: pull towards the shared weights, relative to the inputs' mean square.
    """

    rank: int
    layers: Collection[str]
    damping: float = DAMPING


@dataclass(frozen=True)
class _Kept:
    """One task's statistics of a group of layers, which may lie on disk."""

    gram: CachedTensor
    cross: Mapping[str, CachedTensor]
    mean: Tensor
    output_mean: Mapping[str, Tensor]


class ResidualFitter:
    """Keeps every task's statistics of a group until its codes are chosen, then corrects it.

    Args:
        model: whose layers are quantized.
        students: takes the corrections.
        experts: whose biases belong to the outputs aimed at.
        cache: keeps statistics.
        settings: how corrections are fitted.
    """

    def __init__(
        self,
        model: nn.Module,
        students: TaskStudents,
        experts: ExpertWeights,
        cache: ActivationCache,
        settings: ResidualSettings,
    ) -> None:
        self._model = model
        self._students = students
        self._experts = experts
        self._cache = cache
        self._settings = settings
        self._kept: dict[str, _Kept] = {}

    def keep(self, task: str, statistics: TaskStatistics) -> None:
        """Remember one task's statistics of the group that is quantized next."""
        self._kept[task] = _Kept(
            self._cache.keep(statistics.gram, owned=True),
            {name: self._cache.keep(cross, owned=True) for name, cross in statistics.cross.items()},
            statistics.mean,
            statistics.output_mean,
        )

    def correct(self, names: Sequence[str]) -> ModelResiduals:
        """Fit corrections of layers that were just quantized, and forget the statistics."""
        fitted = {name: self._fit(name) for name in names if name in self._settings.layers}
        residuals = ModelResiduals(tuple(self._kept), fitted)
        self._kept.clear()
        self._students.add(residuals)
        return residuals

    def _fit(self, name: str) -> LayerResiduals:
        layer = linear_layer(self._model, name)
        rank = min(self._settings.rank, layer.in_features, layer.out_features)
        parts = []
        for task, kept in self._kept.items():
            gap = None
            if layer.bias is not None:
                gap = self._experts.tensor(task, f"{name}.bias") - layer.bias.data
            parts.append(
                fit_correction(
                    layer.weight.data,
                    TaskMoments(
                        kept.gram.peek(), kept.cross[name].peek(), kept.mean, kept.output_mean[name]
                    ),
                    rank=rank,
                    damping=self._settings.damping,
                    bias_gap=gap,
                )
            )
        return stacked(parts)
