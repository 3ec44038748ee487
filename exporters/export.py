"""Export a merged model and its quantized layers as ONNX graphs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn

from epmq_deploy.exporters.check import check_inputs, check_options
from epmq_deploy.exporters.files import PROTOBUF_LIMIT, write_model
from epmq_deploy.exporters.formats import GraphFormat, formats_of
from epmq_deploy.exporters.formats.format import ExportContext
from epmq_deploy.exporters.int8_matmul import integer_layers
from epmq_deploy.exporters.packed_linear import pack_linear
from epmq_deploy.exporters.read_codes import FORMAT_KEY
from epmq_deploy.exporters.session import INT8_LEVEL
from epmq_deploy.exporters.swap import export_copy, swapped_copy
from epmq_deploy.exporters.trace import trace
from epmq_deploy.exporters.two_bits import narrow_to_two_bits
from epmq_deploy.exporters.verify import verify_codes, verify_int8_rows, verify_runs_low_bit
from epmq_deploy.models.family import Deployable
from epmq_deploy.quantization.quantized_linear import QuantizedLinear

FP32_FORMAT = "fp32"


@dataclass(frozen=True)
class ExportedGraph:
    """One file that was written and verified.

    Attributes:
        format: a registered format's name.
        path: the ``.onnx`` file.
        bytes: size on disk, external data included.
        opset: version of the default operator set.
        low_bit_nodes: nodes that multiply by a linear layer's codes in the graph onnxruntime runs.
        layers: what the format decided for each layer, by dotted name.
    """

    format: str
    path: Path
    bytes: int
    opset: int
    low_bit_nodes: int
    layers: Mapping[str, Any] = field(default_factory=dict)


def export_graphs(
    model: Deployable,
    example_inputs: tuple[Tensor, ...],
    layers: Mapping[str, QuantizedLinear],
    replaced: Mapping[str, Tensor],
    formats: Sequence[str],
    output: Path,
    *,
    opset: int = 21,
    accuracy_level: int = 0,
    two_bit_containers: bool | None = None,
    file_limit: int = PROTOBUF_LIMIT,
    context: ExportContext | None = None,
) -> tuple[ExportedGraph, ...]:
    """Write the merged model in float32 and its quantized form in every format asked for.

    All formats are lowered from one graph and hold the solver's codes bit for bit, which is
    checked on the files written.

    Args:
        model: the merged model, float32, on CPU; left as it is.
        example_inputs: as ``model.input_names``, a batch of at least 2.
        layers: by the backbone's dotted module name: linear layers, and, with 8 bits, symmetric
            and one group per row, convolutions (codes ``[N, C * kh * kw]``) and embeddings
            (``[V, D]``), which become INT8 tensors in standard operators whatever the format.
        replaced: float32 parameters that quantization changed besides the weights, by the
            backbone's parameter name; not part of the float32 graph.
        formats: names from `epmq_deploy.exporters.formats.format_names`; ``fp32`` is written
            in any case.
        output: an existing folder.
        opset: version of the default operator set.
        accuracy_level: of MatMulNBits: 0 computes in float32, 4 in int8.
        two_bit_containers: whether formats that can store 2-bit codes in 2 bits, not 4; when absent
            at accuracy level 4 (see `epmq_deploy.exporters.two_bits`).
        file_limit: bytes of tensors beyond which a graph's tensors go beside it into ``_data``.
        context: what formats may want to know besides; nothing when absent.

    Returns:
        The float32 graph, other float formats, then the low-bit ones in the order given.

    Raises:
        RecipeError: an unknown format, or options or group sizes a format cannot hold.
        MismatchError: layers, parameters or inputs that do not belong to the model, or a layer that
            runs more than once.
        NumericsError: a written file does not hold the codes or would not run in low bits.
    """
    linear, rows = by_kind(model.backbone, layers)
    known = context or ExportContext()
    chosen = [fmt.planned(linear, known) for fmt in formats_of(formats)]
    check_options(chosen, linear, opset, accuracy_level)
    check_inputs(model, example_inputs, layers, replaced)
    packed = {name: pack_linear(name, layer) for name, layer in linear.items()}
    two_bits = accuracy_level == INT8_LEVEL if two_bit_containers is None else two_bit_containers
    write = partial(
        _write,
        stem=model.stem,
        output=output,
        opset=opset,
        accuracy_level=accuracy_level,
        file_limit=file_limit,
    )

    graph = trace(export_copy(model), example_inputs, opset)
    floats = [fmt for fmt in chosen if not fmt.low_bit and fmt.name != FP32_FORMAT]
    written = [write(graph.clone(), fmt, {}, {}) for fmt in (*formats_of([FP32_FORMAT]), *floats)]
    quantized = [fmt for fmt in chosen if fmt.low_bit]
    if not quantized:
        return tuple(written)
    twin = swapped_copy(model, packed, rows, replaced, accuracy_level)
    graph = trace(twin, example_inputs, opset)
    for fmt in quantized:
        # A copy shares the tensors, so that each format lowers the same codes.
        lowered = graph.clone()
        if two_bits and fmt.stores_two_bits:
            narrow_to_two_bits(lowered.graph)
        written.append(write(lowered, fmt, linear, rows))
    return tuple(written)


def by_kind(
    backbone: nn.Module, layers: Mapping[str, QuantizedLinear]
) -> tuple[dict[str, QuantizedLinear], dict[str, QuantizedLinear]]:
    """Linear layers, and those with one scale per row; what the model lacks is left for checks."""
    modules = dict(backbone.named_modules())
    rows = {
        name: layer
        for name, layer in layers.items()
        if isinstance(modules.get(name), nn.Conv2d | nn.Embedding)
    }
    return {name: layer for name, layer in layers.items() if name not in rows}, rows


def _write(
    graph: ir.Model,
    fmt: GraphFormat,
    linear: Mapping[str, QuantizedLinear],
    rows: Mapping[str, QuantizedLinear],
    *,
    stem: str,
    output: Path,
    opset: int,
    accuracy_level: int,
    file_limit: int,
) -> ExportedGraph:
    """Lower a graph, write it, and verify what the file holds and how it runs."""
    fmt.lower(graph)
    graph.metadata_props[FORMAT_KEY] = fmt.name
    path = output / f"{stem}{fmt.suffix}.onnx"
    size = write_model(graph, path, limit=file_limit)
    if linear or rows:
        verify_codes(path, {**linear, **rows})
        verify_int8_rows(path, rows)
    nodes = verify_runs_low_bit(path, linear, accuracy_level, integer_layers(graph.graph))
    return ExportedGraph(fmt.name, path, size, opset, nodes, fmt.details())
