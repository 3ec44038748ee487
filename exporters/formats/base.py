"""What an export format has to provide."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import onnx_ir as ir

from epmq_deploy.models.blocks import Group
from epmq_deploy.quantization.results import LayerInputs, QuantizedLinear
from epmq_deploy.recipe import ExportOptions


@dataclass(frozen=True)
class ExportContext:
    """What formats may want to know besides codes.

    Attributes:
        options: of the export.
        inputs: what calibration saw of layers' inputs, by layer name; empty without activations.
        groups: layers that share an input.
    """

    options: ExportOptions = field(default_factory=ExportOptions)
    inputs: Mapping[str, LayerInputs] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()


# Of activations rounded to int8, layer after layer; evaluation decides whether that is good enough,
# parity only tells it from a wrong graph.
INT8_TOLERANCE = 0.3


# The first with 4-bit types.
TRACED_OPSET = 21


class GraphFormat(ABC):
    """One way to write a model into an ONNX file.

    Attributes:
        name: what recipes call it.
        suffix: the file is ``model<suffix>.onnx``; transformers.js and optimum look for these.
        summary: one line for listings.
        low_bit: whether it holds the quantized layers; otherwise it is the merged model in float.
        stores_two_bits: whether it may hold codes in 2-bit containers.
        tolerance: largest distance from torch, relative to the norm of an output
            (`epmq_deploy.exporters.verification.parity`); the default is for float32 arithmetic.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    summary: ClassVar[str]
    low_bit: ClassVar[bool] = True
    stores_two_bits: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-3

    def planned(
        self, layers: Mapping[str, QuantizedLinear], context: ExportContext
    ) -> "GraphFormat":
        """The format, set up for one export of these linear layers."""
        return self

    def details(self) -> Mapping[str, Any]:
        """What was decided for each layer, by dotted name, as plain data."""
        return {}

    @abstractmethod
    def check(self, layers: Mapping[str, QuantizedLinear]) -> list[str]:
        """What keeps linear layers, by dotted name, from being exported: one sentence each."""

    def usual_opset(self, model: ir.Model) -> int:
        """The version of the default operator set for a graph, unless the user asks for another.

        Args:
            model: as ``lower`` takes it, of `TRACED_OPSET`.
        """
        return TRACED_OPSET

    @abstractmethod
    def lower(self, model: ir.Model) -> None:
        """Turn the MatMulNBits graph (`exporters.graphs.layers`) into this format, in place.

        Naming must be kept: node ``<layer>``, initializers ``<layer>.codes`` and so on.
        """

    @abstractmethod
    def read(self, model: ir.Model) -> Iterator[tuple[str, QuantizedLinear]]:
        """The linear layers with dotted names, of the container's width and the block size.

        Convolutions and embeddings are stored alike in all formats
        (`epmq_deploy.exporters.lowering.int8.rows`).
        """


class FloatFormat(GraphFormat):
    """The merged model before quantization, for comparison; ``lower`` is given its float graph."""

    low_bit = False

    def check(self, layers: Mapping[str, QuantizedLinear]) -> list[str]:
        """Nothing: it holds no layers."""
        return []

    def read(self, model: ir.Model) -> Iterator[tuple[str, QuantizedLinear]]:
        """See base: none."""
        return iter(())
