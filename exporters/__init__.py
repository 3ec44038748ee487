"""ONNX export: one graph with low-bit layers, lowered to every format asked for."""

from epmq_deploy.exporters.formats import (
    format_names,
    formats_of,
    low_bit_format_names,
)
from epmq_deploy.exporters.graphs.build import FP32_FORMAT, write_graphs
from epmq_deploy.exporters.verification.codes import read_codes
from epmq_deploy.exporters.verification.graphs import ExportedGraph, verify_graph
from epmq_deploy.runtime.ort.graph_runs import session_config

__all__ = [
    "FP32_FORMAT",
    "ExportedGraph",
    "format_names",
    "formats_of",
    "low_bit_format_names",
    "read_codes",
    "session_config",
    "verify_graph",
    "write_graphs",
]
