"""Exported graphs as files, and the checks that each of them passes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epmq_deploy.exporters.memory import (
    eager_free,
    frozen_gc,
    release_memory,
)
from epmq_deploy.exporters.verification.corrections import verify_corrections
from epmq_deploy.exporters.verification.kernels import (
    verify_codes,
    verify_int8_rows,
    verify_runs_low_bit,
)
from epmq_deploy.quantization.residuals.factors import ModelResiduals
from epmq_deploy.quantization.results import QuantizedLinear


@dataclass(frozen=True)
class GraphFile:
    """One ONNX file.

    Attributes:
        format: a registered format's name.
        part: the graph's role, ``model`` where a model is one graph.
        path: the ``.onnx`` file.
        bytes: size on disk, external data included.
        opset: version of the default operator set.
        layers: what the format decided for each layer, by dotted name.
    """

    format: str
    part: str
    path: Path
    bytes: int
    opset: int
    layers: Mapping[str, Any]


@dataclass(frozen=True)
class WrittenGraph(GraphFile):
    """A file and what `verify_graph` wants to see in it.

    Attributes:
        linear: linear layers, by dotted name; none in a float format.
        rows: convolutions and embeddings likewise.
        integer: layers that are to run as integer GEMM, by dotted name.
        accuracy_level: of the MatMulNBits nodes.
        runs: names of the nodes that multiply the model's inputs by linear layers; None for one
            node a layer, called like it.
        corrections: of layers for every task.
    """

    linear: Mapping[str, QuantizedLinear]
    rows: Mapping[str, QuantizedLinear]
    integer: Collection[str]
    accuracy_level: int
    runs: Collection[str] | None = None
    corrections: ModelResiduals = field(default_factory=ModelResiduals)


@dataclass(frozen=True)
class ExportedGraph(GraphFile):
    """A file that was verified.

    Attributes:
        low_bit_nodes: nodes that multiply by a linear layer's codes in the graph onnxruntime runs.
    """

    low_bit_nodes: int


@frozen_gc()
def verify_graph(graph: WrittenGraph) -> ExportedGraph:
    """Verify that a file holds its layers' codes and that onnxruntime would run them in low bits.

    A float graph holds none; that it loads and computes the same is for `parity` to find.

    Raises:
        NumericsError: it does not hold the codes, or would not run in low bits.
    """
    nodes = 0
    if graph.linear or graph.rows:
        with eager_free():
            verify_codes(graph.path, {**graph.linear, **graph.rows})
            release_memory()
            verify_int8_rows(graph.path, graph.rows)
            release_memory()
            verify_corrections(graph.path, graph.corrections)
            release_memory()
        nodes = verify_runs_low_bit(
            graph.path, graph.linear, graph.accuracy_level, graph.integer, graph.runs
        )
    return ExportedGraph(
        graph.format, graph.part, graph.path, graph.bytes, graph.opset, graph.layers, nodes
    )
