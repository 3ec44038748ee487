"""What quantization yields: codes and grids, reports, and what layers received."""

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from epmq_deploy.models.head import TaskHead
from epmq_deploy.quantization.residuals.factors import ModelResiduals
from epmq_deploy.quantization.solver.gptq import Status
from epmq_deploy.quantization.solver.grid import expand_groups


@dataclass(frozen=True)
class QuantizedLinear:
    """Codes and grid of one linear layer; ``weight = (codes - zero_point) * scale``.

    Attributes:
        codes: uint8 ``[N, K]`` (out, in), each below ``2**bits``; unpacked, original column order.
        scales: float32 ``[N, G]`` with ``G = ceil(K / group_size)``; column ``k`` belongs to
            group ``k // group_size``.
        zero_points: uint8 ``[N, G]``.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; ``K`` when quantized per channel.
        symmetric: whether every zero point is ``2**(bits - 1)``.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    bits: int
    group_size: int
    symmetric: bool

    @property
    def out_features(self) -> int:
        """``N``."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """``K``."""
        return self.codes.shape[1]

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes and zero points packed to ``bits``, and of scales."""
        bits = (self.codes.numel() + self.zero_points.numel()) * self.bits
        return bits // 8 + self.scales.nbytes

    def codes_sha256(self) -> str:
        """Return the sha256 of the codes, one byte each, row by row, however files pack them."""
        return hashlib.sha256(self.codes.cpu().contiguous().numpy().tobytes()).hexdigest()

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, float32 ``[N, K]``."""
        weight = self.codes.to(torch.float32)
        # In place: a model's largest layer would otherwise be in memory five times.
        weight -= expand_groups(self.zero_points, self.group_size, self.in_features)
        weight *= expand_groups(self.scales, self.group_size, self.in_features)
        return weight


@dataclass(frozen=True)
class LayerReport:
    """How one layer was quantized.

    Attributes:
        layer: dotted name.
        status: the solver's; ``kept`` for a layer left in float; ``refitted`` for a norm.
        reason: why it was kept, or not solved as asked; empty otherwise.
        bits: bits per weight, 0 if kept.
        group_size: columns per scale, 0 if kept.
        error_before: ``tr((Q - W*) H (Q - W*)^T)`` of ``W*`` rounded to nearest on the first grid,
            relative to ``tr(W* H W*^T)``.
        error_after: the same of the codes and grid chosen, with the damping added.
        added_damping: what the solver added to the Hessian's diagonal.
        tokens: calibration tokens used.
        seconds: time spent on the layer, without gathering statistics.
    """

    layer: str
    status: Status | Literal["kept", "refitted"]
    reason: str = ""
    bits: int = 0
    group_size: int = 0
    error_before: float = 0.0
    error_after: float = 0.0
    added_damping: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer's result.

    Attributes:
        linear: codes and grid, on the CPU.
        bias: re-fitted bias, float32 ``[N]``, or None where it stays as it was.
        report: of the layer.
    """

    linear: QuantizedLinear
    bias: Tensor | None
    report: LayerReport


@dataclass(frozen=True)
class LayerInputs:
    """Inputs ``x`` of one quantized layer over all calibration tokens.

    Attributes:
        low: smallest, float32 ``[K]``.
        high: largest, float32 ``[K]``.
        square: mean of ``x^2``, float32 ``[K]``, tokens and tasks weighted as for the codes.
        output: mean of ``||Q x||^2`` with the layer's dequantized weight ``Q``, without bias,
            weighted in the same way.
    """

    low: Tensor
    high: Tensor
    square: Tensor
    output: float


@dataclass
class QuantizedModel:
    """Results of quantizing a model, or some of its blocks.

    Attributes:
        layers: codes and grids by layer name.
        replaced: parameters given new values (re-fitted biases and norms), by parameter name.
        reports: one per layer quantized or norm re-fitted, in running order, then those kept.
        errors: per layer its error by width, where widths were probed.
        inputs: what calibration saw of layers' inputs, by layer name; empty without activations.
        heads: re-fitted heads, by task; empty where heads stay as they were.
        residuals: corrections of layers for every task.
    """

    layers: dict[str, QuantizedLinear] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    errors: dict[str, dict[int, float]] = field(default_factory=dict)
    inputs: dict[str, LayerInputs] = field(default_factory=dict)
    heads: dict[str, TaskHead] = field(default_factory=dict)
    residuals: ModelResiduals = field(default_factory=ModelResiduals)

    def extend(self, other: "QuantizedModel") -> None:
        """Add the results of further blocks."""
        self.layers |= other.layers
        self.replaced |= other.replaced
        self.reports += other.reports
        self.errors |= other.errors
        self.inputs |= other.inputs
        self.heads |= other.heads
        self.residuals = self.residuals.joined(other.residuals)
