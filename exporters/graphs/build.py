"""Export a merged model and its quantized layers as ONNX graphs."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import onnx_ir as ir
from onnxscript.version_converter import convert_version
from torch import Tensor, nn

from epmq_deploy.exporters.files import PROTOBUF_LIMIT, write_model
from epmq_deploy.exporters.formats import GraphFormat, formats_of
from epmq_deploy.exporters.formats.base import TRACED_OPSET, ExportContext, FormatPlan
from epmq_deploy.exporters.graphs.corrections import (
    ModelOfTasks,
    add_corrections,
    mixed_tasks,
)
from epmq_deploy.exporters.graphs.swap import export_copy, swapped_copy
from epmq_deploy.exporters.graphs.trace import trace
from epmq_deploy.exporters.lowering.int8.matmul import integer_layers
from epmq_deploy.exporters.lowering.layers import linear_runs
from epmq_deploy.exporters.lowering.two_bits import NarrowToTwoBits
from epmq_deploy.exporters.memory import (
    eager_free,
    frozen_gc,
    release_memory,
)
from epmq_deploy.exporters.packing.packed_linear import pack_linear
from epmq_deploy.exporters.verification.codes import FORMAT_KEY
from epmq_deploy.exporters.verification.graphs import WrittenGraph
from epmq_deploy.exporters.verification.inputs import check_inputs, check_options
from epmq_deploy.exporters.verification.kernels import verify_valid
from epmq_deploy.models.deployable import Deployable
from epmq_deploy.models.head import TaskHead
from epmq_deploy.quantization.residuals.factors import ModelResiduals
from epmq_deploy.quantization.results import QuantizedLinear
from epmq_deploy.runtime.ort.graph_runs import INT8_LEVEL

FP32_FORMAT = "fp32"


@frozen_gc()
def write_graphs(
    model: Deployable,
    example_inputs: tuple[Tensor, ...],
    layers: Mapping[str, QuantizedLinear],
    replaced: Mapping[str, Tensor],
    formats: Sequence[str],
    output: Path,
    *,
    opset: int | None = None,
    accuracy_level: int = 0,
    two_bit_containers: bool | None = None,
    file_limit: int = PROTOBUF_LIMIT,
    context: ExportContext | None = None,
    heads: Mapping[str, TaskHead] | None = None,
    residuals: ModelResiduals | None = None,
) -> tuple[WrittenGraph, ...]:
    """Write the merged model in float32 and its quantized form in every format asked for.

    All formats are lowered from one graph and hold the solver's codes bit for bit, which
    `verify_graph` checks on the files; it does not need the model any more.

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
        opset: version of the default operator set; default: each format's usual one.
        accuracy_level: of MatMulNBits: 0 computes in float32, 4 in int8.
        two_bit_containers: whether formats that can store 2-bit codes in 2 bits, not 4; default:
            at accuracy level 4 (see `epmq_deploy.exporters.lowering.two_bits`).
        file_limit: bytes of tensors beyond which a graph's tensors go next to it into ``_data``.
        context: what formats may want to know in addition; default: nothing.
        heads: by task, those that quantization re-fitted; not part of the float32 graph.
        residuals: corrections of layers for every task; with any, low-bit graphs have an input
            ``task``, int64 ``[batch]``, which numbers the tasks.

    Returns:
        The float32 graph, other float formats, then the low-bit ones in the order given.

    Raises:
        RecipeError: an unknown format, or options or group sizes a format cannot hold.
        MismatchError: layers, parameters or inputs that do not belong to the model, or a layer that
            runs more than once.
        NumericsError: a graph is not valid ONNX.
    """
    linear, rows = by_kind(model.backbone, layers)
    chosen = formats_of(formats)
    plans = {fmt.name: fmt.plan(linear, context or ExportContext()) for fmt in chosen}
    check_options(plans, opset, accuracy_level)
    check_inputs(model, example_inputs, layers, replaced)
    packed = {name: pack_linear(name, layer) for name, layer in linear.items()}
    two_bits = accuracy_level == INT8_LEVEL if two_bit_containers is None else two_bit_containers
    write = partial(
        _write,
        part=model.stem,
        output=output,
        opset=opset,
        accuracy_level=accuracy_level,
        file_limit=file_limit,
    )

    floats = [fmt for fmt in chosen if not fmt.low_bit and fmt.name != FP32_FORMAT]
    plans.setdefault(FP32_FORMAT, FormatPlan())
    traced = opset or TRACED_OPSET
    graph = trace(export_copy(model), example_inputs, traced)
    written = [
        write(graph.clone(), fmt, plans[fmt.name], {}, {})
        for fmt in (*formats_of([FP32_FORMAT]), *floats)
    ]
    del graph
    quantized = [fmt for fmt in chosen if fmt.low_bit]
    if not quantized:
        return tuple(written)
    corrections = residuals or ModelResiduals()
    if corrections.layers:
        of_tasks = swapped_copy(ModelOfTasks(model), packed, rows, replaced, accuracy_level)
        add_corrections(of_tasks, corrections)
        (mixed,) = mixed_tasks([example_inputs], len(corrections.tasks))
        graph = trace(of_tasks, mixed, traced, corrections.layers)
        del of_tasks
    else:
        twin = swapped_copy(model, packed, rows, replaced, accuracy_level, heads)
        graph = trace(twin, example_inputs, traced)
        del twin
    del packed
    write_low_bit = partial(write, linear=linear, rows=rows, corrections=corrections)
    written += _write_quantized(graph, quantized, plans, write_low_bit, two_bits=two_bits)
    del graph
    release_memory()
    return tuple(written)


def _write_quantized(
    graph: ir.Model,
    formats: Sequence[GraphFormat],
    plans: Mapping[str, FormatPlan],
    write: Callable[[ir.Model, GraphFormat, FormatPlan], WrittenGraph],
    *,
    two_bits: bool,
) -> list[WrittenGraph]:
    """Lower one graph to every low-bit format and write each; the last one takes the graph."""
    written = []
    for fmt in formats:
        # A copy shares the tensors, so that each format lowers the same codes.
        lowered = graph if fmt is formats[-1] else graph.clone()
        if two_bits and fmt.stores_two_bits:
            NarrowToTwoBits()(lowered)
        written.append(write(lowered, fmt, plans[fmt.name]))
        del lowered
        release_memory()
    return written


def by_kind(
    backbone: nn.Module, layers: Mapping[str, QuantizedLinear]
) -> tuple[dict[str, QuantizedLinear], dict[str, QuantizedLinear]]:
    """Return linear layers, and those with one scale per row; the checks find what is missing."""
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
    plan: FormatPlan,
    linear: Mapping[str, QuantizedLinear],
    rows: Mapping[str, QuantizedLinear],
    *,
    part: str,
    output: Path,
    opset: int | None,
    accuracy_level: int,
    file_limit: int,
    corrections: ModelResiduals | None = None,
) -> WrittenGraph:
    """Lower a graph, check it and write it."""
    version = opset or fmt.usual_opset(graph)
    with eager_free():
        convert_version(graph, version)
        plan.lower(graph)
    graph.metadata_props[FORMAT_KEY] = fmt.name
    path = output / f"{part}{fmt.suffix}.onnx"
    verify_valid(graph, path.name)
    size = write_model(graph, path, limit=file_limit)
    return WrittenGraph(
        fmt.name,
        part,
        path,
        size,
        version,
        plan.details,
        linear,
        rows,
        integer_layers(graph.graph),
        accuracy_level,
        linear_runs(graph.graph, linear),
        corrections or ModelResiduals(),
    )
