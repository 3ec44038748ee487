"""What an export format has to provide."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import onnx_ir as ir

from epmq_deploy.models.blocks import Group
from epmq_deploy.quantization.results import LayerInputs, QuantizedLinear
from epmq_deploy.recipe import ExportOptions

log = logging.getLogger(__name__)

# Of activations rounded to int8, layer after layer; evaluation decides whether that is good enough,
# parity only tells it from a wrong graph.
INT8_TOLERANCE = 0.3

# The first with 4-bit types.
TRACED_OPSET = 21


@dataclass(frozen=True)
class ExportContext:
    """What formats may want to know in addition to codes.

    Attributes:
        options: of the export.
        inputs: what calibration saw of layers' inputs, by layer name; empty without activations.
        groups: layers that share an input.
    """

    options: ExportOptions = field(default_factory=ExportOptions)
    inputs: Mapping[str, LayerInputs] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True)
class FormatPlan:
    """How one export's graphs become a format.

    Attributes:
        passes: rewrite a graph into the format, in this order.
        problems: what keeps the layers from being exported as asked, one sentence each.
        details: what was decided for each layer, by dotted name, as plain data.
    """

    passes: Sequence[ir.passes.InPlacePass] = ()
    problems: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def lower(self, model: ir.Model) -> None:
        """Rewrite a graph in place, one pass after the other."""
        for each in self.passes:
            result = each(model)
            name = type(each).__name__
            log.debug("%s: %s", name, "modified" if result.modified else "nothing to do")


class GraphFormat(ABC):
    """One way to write a model into an ONNX file.

    Attributes:
        name: what recipes call it.
        suffix: the file is ``model<suffix>.onnx``; transformers.js and optimum look for these.
        summary: one line for listings.
        default: whether it is written where neither formats nor a target are given.
        low_bit: whether it holds the quantized layers; otherwise it is the merged model in float,
            to compare with.
        stores_two_bits: whether it may hold codes in 2-bit containers.
        tolerance: largest distance from torch, relative to the norm of an output
            (`exporters.verification.parity`); the default is for float32 arithmetic.
        option_names: options of an export that only this format looks at.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    summary: ClassVar[str]
    default: ClassVar[bool] = False
    low_bit: ClassVar[bool] = True
    stores_two_bits: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-3
    option_names: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def plan(self, layers: Mapping[str, QuantizedLinear], context: ExportContext) -> FormatPlan:
        """Decide how graphs of these linear layers become this format.

        The passes are given the MatMulNBits graph (`exporters.lowering.layers`), or the float
        graph where the format is not a low-bit one. They must keep its naming: node ``<layer>``,
        initializers ``<layer>.codes`` and so on.

        Args:
            layers: by dotted name.
            context: what else is known.
        """

    def usual_opset(self, model: ir.Model) -> int:
        """Return the version of the default operator set, unless the user asks for another.

        Args:
            model: as the passes are given it, of `TRACED_OPSET`.
        """
        return TRACED_OPSET

    @abstractmethod
    def read(self, model: ir.Model) -> Iterator[tuple[str, QuantizedLinear]]:
        """Yield linear layers with dotted names, of the container's width and the block size.

        Convolutions and embeddings are stored alike in all formats
        (`exporters.lowering.int8.rows`).
        """


class FloatFormat(GraphFormat):
    """The merged model before quantization: a reference that low-bit graphs are compared with."""

    low_bit = False

    def read(self, model: ir.Model) -> Iterator[tuple[str, QuantizedLinear]]:
        """Yield nothing: a float graph holds no quantized layers."""
        return iter(())
