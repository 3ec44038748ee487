"""GPTAQ (Li et al., arXiv 2504.02692): reproduce the outputs of the unquantized path.

GPTQ asks each layer to answer the quantized path's inputs as the merged layer would. The error of
earlier layers is in those inputs already, so here the layer is asked for what it would give on the
unquantized path: ``Y_t = Z_t W_m^T``. That problem is solved exactly, anchored at ``W_m``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.options.quantization import CalibratedOptions
from epmq_deploy.quantization import solver
from epmq_deploy.quantization.anchored import anchored_problem
from epmq_deploy.quantization.base import (
    Guide,
    LayerProblem,
    LayerWeights,
    QuantizationMethod,
    fits_jointly,
)

if TYPE_CHECKING:
    from epmq_deploy.calibration.statistics import GroupSums
    from epmq_deploy.quantization.solver.hessian import GroupHessian


class GptaqOptions(CalibratedOptions):
    """GPTAQ."""

    method: Literal["gptaq"] = "gptaq"
    damping: float = Field(
        0.01,
        gt=0,
        description="pull towards the merged weights, relative to the Hessian's mean diagonal",
    )


class Gptaq(QuantizationMethod[GptaqOptions]):
    """``Y_t = Z_t W_m^T``, ``A = W_m``; ``Z_t`` are the layer's inputs in the merged model."""

    options = GptaqOptions
    summary = "reproduce the unquantized merged model's outputs (arXiv 2504.02692)"
    guide = Guide.MERGED

    def mix(self, options: GptaqOptions) -> float:
        """The unquantized path's own outputs, nothing else."""
        return 1.0

    def hessian(self, sums: GroupSums, options: GptaqOptions) -> GroupHessian:
        """See base."""
        matrix = sums.gram.clone()
        matrix.diagonal().add_(_strength(sums, options))
        return solver.hessian.GroupHessian(
            solver.hessian.Hessian(
                matrix, act_order=options.act_order, dtype=self.solver_dtype(options)
            ),
            sums.mean,
            sums.weight,
        )

    def problem(
        self, layer: LayerWeights, sums: GroupSums, hessian: GroupHessian, options: GptaqOptions
    ) -> LayerProblem:
        """See base."""
        return anchored_problem(
            layer,
            sums,
            hessian,
            layer.merged,
            layer.bias,
            strength=_strength(sums, options),
            bias_strength=0.0,
            joint=fits_jointly(layer, options),
        )


def _strength(sums: GroupSums, options: GptaqOptions) -> float:
    return options.damping * float(sums.gram.diagonal().mean())


METHOD = Gptaq()
