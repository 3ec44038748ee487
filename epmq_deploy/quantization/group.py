"""Quantizing layers that share an input, from the statistics of that input."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.statistics import GroupSums
from epmq_deploy.models.modules import linear_layer
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.quantization.base import LayerProblem, LayerWeights, QuantizationMethod
from epmq_deploy.quantization.expert_source import ExpertWeights
from epmq_deploy.quantization.layer import layer_inputs, quantize_layer, refit_bias
from epmq_deploy.quantization.results import QuantizedModel

log = logging.getLogger(__name__)


class GroupQuantizer:
    """Turns statistics into problems and problems into layers, in place.

    Args:
        model: whose layers are quantized.
        method: states the problems.
        options: of the method.
        experts: base and experts, for methods that use them.
        rounding: quantize; otherwise layers get the method's weights in float32.
        probe: by layer, widths in bits at which its error is measured in addition.
    """

    def __init__(
        self,
        model: nn.Module,
        method: QuantizationMethod[Any],
        options: QuantizeOptions,
        experts: ExpertWeights | None,
        *,
        rounding: bool = True,
        probe: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        self._model = model
        self._method = method
        self._options = options
        self._experts = experts
        self._rounding = rounding
        self._probe = probe or {}

    def quantize(self, names: Sequence[str], sums: GroupSums) -> QuantizedModel:
        """Quantize layers that share an input.

        Args:
            names: dotted names.
            sums: statistics over all tasks.

        Raises:
            NumericsError: a layer could not be solved as asked; names it.
        """
        result = QuantizedModel()
        hessian = self._method.hessian(sums, self._options)
        for name in names:
            layer = linear_layer(self._model, name)
            weights = self._weights(name, layer)
            problem = self._method.problem(weights, sums, hessian, self._options)
            if name in self._probe:
                result.errors[name] = self._probed(name, problem, sums)
            if self._rounding:
                weight, bias = self._rounded(name, layer, problem, sums, result)
            else:
                weight = problem.weight.to(torch.float32).contiguous()
                options = self._options.for_layer(name)
                bias = refit_bias(name, layer.bias, problem.weight, problem, sums, options)
            layer.weight.data = weight.to(layer.weight.device)
            if bias is not None:
                layer.bias.data = bias
                result.replaced[f"{name}.bias"] = bias.cpu()
        return result

    def _weights(self, name: str, layer: nn.Linear) -> LayerWeights:
        if self._experts is None:
            return LayerWeights(name, layer.weight, layer.bias)
        base = self._experts.base_tensor(f"{name}.weight")
        base_bias = None if layer.bias is None else self._experts.base_tensor(f"{name}.bias")
        return LayerWeights(name, layer.weight, layer.bias, base, base_bias)

    def _probed(self, name: str, problem: LayerProblem, sums: GroupSums) -> dict[int, float]:
        """Return a layer's relative error at every width to probe, without refinement."""
        options = self._options.for_layer(name)
        errors = {}
        for bits in self._probe[name]:
            probed = quantize_layer(name, None, problem, sums, options.probing(bits))
            errors[bits] = probed.report.error_after
        return errors

    def _rounded(
        self,
        name: str,
        layer: nn.Linear,
        problem: LayerProblem,
        sums: GroupSums,
        result: QuantizedModel,
    ) -> tuple[Tensor, Tensor | None]:
        """Add a layer's codes and report to ``result``; return its new weight and bias."""
        solved = quantize_layer(name, layer.bias, problem, sums, self._options.for_layer(name))
        result.layers[name] = solved.linear
        result.reports.append(solved.report)
        if solved.report.reason:
            log.warning("%s: %s (%s)", name, solved.report.status, solved.report.reason)
        weight = solved.linear.dequantize()
        if (inputs := layer_inputs(sums, weight)) is not None:
            result.inputs[name] = inputs
        return weight, solved.bias
