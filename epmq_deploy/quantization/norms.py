"""Re-fitting gains and biases of norms: a ridge fit per channel (FeatCal, arXiv 2605.13030)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.activations import input_of
from epmq_deploy.calibration.block_runner import BlockRunner, ModuleSource
from epmq_deploy.calibration.cache import ActivationCache, CachedTensor
from epmq_deploy.models import Block
from epmq_deploy.models.modules import bias_of
from epmq_deploy.models.norms import pre_affine
from epmq_deploy.models.tokens import counted
from epmq_deploy.quantization.base import CalibrationSettings
from epmq_deploy.quantization.expert_features import Features
from epmq_deploy.quantization.expert_source import ExpertWeights


@dataclass
class NormSums:
    """Weighted sums over tokens and tasks, per channel, float64 ``[K]``.

    With pre-affine activations ``n`` of the student and outputs aimed at ``y``:

    Attributes:
        weight: total weight.
        n: ``sum n``.
        y: ``sum y``.
        nn: ``sum n^2``.
        ny: ``sum n y``.
        yy: ``sum y^2``, for the error.
    """

    weight: float
    n: Tensor
    y: Tensor
    nn: Tensor
    ny: Tensor
    yy: Tensor

    @classmethod
    def zeros(cls, channels: int, device: torch.device) -> "NormSums":
        """Return empty sums."""
        parts = (torch.zeros(channels, dtype=torch.float64, device=device) for _ in range(5))
        return cls(0.0, *parts)

    def add(self, activations: Tensor, target: Tensor, weights: Tensor) -> None:
        """Add tokens.

        Args:
            activations: ``n``, ``[tokens, K]``.
            target: ``y``, ``[tokens, K]``.
            weights: of each token, ``[tokens]``.
        """
        w, n, y = weights.to(activations.dtype), activations, target
        self.weight += float(w.sum())
        self.n += w @ n
        self.y += w @ y
        self.nn += w @ (n * n)
        self.ny += w @ (n * y)
        self.yy += w @ (y * y)

    def add_mean(self, task: "NormSums") -> None:
        """Add a task's sums, scaled to a weight of 1: tasks count alike, whatever their size."""
        for total, part in zip(self._parts(), task._parts(), strict=True):
            total.add_(part, alpha=1 / task.weight)
        self.weight += 1.0

    def _parts(self) -> tuple[Tensor, ...]:
        return self.n, self.y, self.nn, self.ny, self.yy

    def error(self, gain: Tensor, bias: Tensor | None) -> float:
        """Return ``sum (gain n + bias - y)^2`` over channels, relative to ``sum y^2``."""
        g = gain.to(torch.float64)
        b = torch.zeros_like(g) if bias is None else bias.to(torch.float64)
        squares = g * g * self.nn + b * b * self.weight + self.yy
        crossed = g * b * self.n - g * self.ny - b * self.y
        return float((squares + 2 * crossed).sum() / self.yy.sum())


def fit_affine(
    sums: NormSums, gain: Tensor, bias: Tensor | None, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Fit gain and bias, float32 ``[K]``, so that ``gain n + bias`` comes closest to ``y``.

    Minimises, per channel, ``mean (g n + b - y)^2 + damping ((g - gain)^2 + (b - bias)^2)``: a 2x2
    linear system, or one equation where the norm has no bias (RMSNorm).

    Args:
        sums: over calibration tokens.
        gain: anchor ``[K]``.
        bias: anchor ``[K]``; None for a norm without one.
        damping: pull towards the anchor, positive.
    """
    a = sums.nn / sums.weight + damping
    right_gain = sums.ny / sums.weight + damping * gain.to(torch.float64)
    if bias is None:
        return (right_gain / a).to(torch.float32), None
    b = sums.n / sums.weight
    d = 1.0 + damping
    right_bias = sums.y / sums.weight + damping * bias.to(torch.float64)
    determinant = a * d - b * b
    new_gain = (d * right_gain - b * right_bias) / determinant
    new_bias = (a * right_bias - b * right_gain) / determinant
    return new_gain.to(torch.float32), new_bias.to(torch.float32)


@dataclass(frozen=True)
class RefittedNorm:
    """A norm whose gain and bias were re-fitted, and what it received.

    Attributes:
        name: dotted name.
        norm: the norm itself, with its new parameters.
        inputs: by task, batch by batch.
        gain: new gain, float32 ``[K]``.
        bias: new bias, float32 ``[K]``; None for a norm without one.
        error_before: relative error of its outputs with the parameters it had.
        error_after: the same with the new ones.
    """

    name: str
    norm: nn.Module
    inputs: Mapping[str, Sequence[CachedTensor]]
    gain: Tensor
    bias: Tensor | None
    error_before: float
    error_after: float

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The new parameters by dotted name, on the CPU."""
        parameters = {f"{self.name}.weight": self.gain.cpu()}
        if self.bias is not None:
            parameters[f"{self.name}.bias"] = self.bias.cpu()
        return parameters

    def output(self, task: str, index: int) -> Tensor:
        """Return what the norm gives for a batch: the input of the layers after it."""
        with torch.inference_mode():
            output: Tensor = self.norm(self.inputs[task][index].value())
        return output


class NormRefit:
    """Re-fits norms so that their outputs on the student's inputs come closer to the experts'.

    Args:
        model: whose norms are changed in place.
        student: the model as it runs for each task.
        runner: holds the batches.
        experts: whose gains and biases the outputs aimed at are computed with.
        cache: keeps what norms receive.
        settings: of the method; ``norm_mix`` is the share of the experts' own features in the
            outputs aimed at, None as 0.
    """

    def __init__(
        self,
        model: nn.Module,
        student: ModuleSource,
        runner: BlockRunner,
        experts: ExpertWeights,
        cache: ActivationCache,
        settings: CalibrationSettings,
    ) -> None:
        self._model = model
        self._student = student
        self._runner = runner
        self._experts = experts
        self._cache = cache
        self._mix = settings.norm_mix or 0.0
        self._damping = settings.norm_damping
        self._unpooled = settings.unpooled

    def refit(
        self,
        block: Block,
        name: str,
        features: Features,
        *,
        pooled: bool,
        done: Mapping[str, nn.Module],
    ) -> RefittedNorm:
        """Re-fit one norm in place.

        Args:
            block: it belongs to, where the batches are.
            name: its dotted name.
            features: what experts' norms gave.
            pooled: whether only what it gives for pooled tokens reaches the heads.
            done: layers whose outputs will not change any more; see ``input_of``.
        """
        norm = self._model.get_submodule(name)
        gain, bias = norm.get_parameter("weight"), bias_of(norm)
        sums = NormSums.zeros(gain.shape[0], gain.device)
        inputs: dict[str, list[CachedTensor]] = {}
        for task in self._runner.batches:
            task_sums, inputs[task] = self._of_task(
                task, block, name, features.get(task, ()), pooled=pooled, done=done
            )
            sums.add_mean(task_sums)
        new_gain, new_bias = fit_affine(sums, gain, bias, self._damping)
        before, after = sums.error(gain, bias), sums.error(new_gain, new_bias)
        norm.get_parameter("weight").data = new_gain
        if new_bias is not None:
            norm.get_parameter("bias").data = new_bias
        return RefittedNorm(name, norm, inputs, new_gain, new_bias, before, after)

    def _of_task(
        self,
        task: str,
        block: Block,
        name: str,
        features: Sequence[Mapping[str, CachedTensor]],
        *,
        pooled: bool,
        done: Mapping[str, nn.Module],
    ) -> tuple[NormSums, list[CachedTensor]]:
        """Return sums over one task's tokens, and what the norm received, batch by batch."""
        student = self._student.module(task, block.name)
        norm = self._model.get_submodule(name)
        gain = self._experts.tensor(task, f"{name}.weight")
        bias = None if bias_of(norm) is None else self._experts.tensor(task, f"{name}.bias")
        sums = NormSums.zeros(gain.shape[0], gain.device)
        received = []
        for index, batch in enumerate(self._runner.batches[task]):
            inputs = input_of(student, norm, batch.student, done, self._cache)
            received.append(self._cache.keep(inputs))
            unpooled = self._unpooled if pooled else 1.0
            weights = batch.token_weights(block.stream, inputs, unpooled)
            activations, token_weights = counted(pre_affine(norm, inputs), weights)
            # Some models hand norms what products left in another dtype.
            activations = activations.to(torch.float32)
            target = activations
            if self._mix and features:
                feature, _ = counted(features[index][name].peek(), weights)
                target = torch.lerp(activations, feature.to(activations.dtype), self._mix)
            target = target * gain
            sums.add(activations, target if bias is None else target + bias, token_weights)
        return sums, received
