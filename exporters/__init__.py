"""Export to ONNX: one graph with low-bit layers, lowered to every format asked for.

The packages, from the lowest to the highest; each imports only those before it:
``packing`` stores codes as ONNX tensors, ``files`` writes models to disk, ``lowering`` rewrites
graphs, ``formats`` says which rewriting makes which format, ``verification`` checks the files that
were written, ``graphs`` traces models and writes their graphs, ``targets`` holds what devices can
run, ``browser`` writes a page that runs a graph, and ``stage`` is the export stage.

Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from epmq_deploy.lazy import exports

if TYPE_CHECKING:
    from epmq_deploy.exporters.formats import (
        format_names,
        formats_of,
        low_bit_format_names,
    )
    from epmq_deploy.exporters.graphs.build import FP32_FORMAT, write_graphs
    from epmq_deploy.exporters.stage import export
    from epmq_deploy.exporters.verification.codes import read_codes
    from epmq_deploy.exporters.verification.graphs import ExportedGraph, verify_graph
    from epmq_deploy.runtime.ort.graph_runs import session_config

_MODULES = {
    "epmq_deploy.exporters.formats": ("format_names", "formats_of", "low_bit_format_names"),
    "epmq_deploy.exporters.graphs.build": ("FP32_FORMAT", "write_graphs"),
    "epmq_deploy.exporters.stage": ("export",),
    "epmq_deploy.exporters.verification.codes": ("read_codes",),
    "epmq_deploy.exporters.verification.graphs": ("ExportedGraph", "verify_graph"),
    "epmq_deploy.runtime.ort.graph_runs": ("session_config",),
}
__getattr__ = exports(__name__, _MODULES)

__all__ = [
    "FP32_FORMAT",
    "ExportedGraph",
    "export",
    "format_names",
    "formats_of",
    "low_bit_format_names",
    "read_codes",
    "session_config",
    "verify_graph",
    "write_graphs",
]


def __dir__() -> list[str]:
    return __all__
