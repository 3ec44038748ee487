"""From a torch model to a clean onnx-ir model, quietly."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    NameFixPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from torch import Tensor

from epmq_deploy.exporters.lowering.corrections import LowerCorrections
from epmq_deploy.exporters.lowering.int8.rows import LowerRows
from epmq_deploy.exporters.lowering.naming import NameFloatLayers, NameLayers
from epmq_deploy.models.deployable import Deployable
from epmq_deploy.quantization.residuals.factors import LayerResiduals
from epmq_deploy.version import __version__

log = logging.getLogger(__name__)


_CLEANING: tuple[ir.passes.InPlacePass, ...] = (
    # A model that only looks at a stand-in's weight leaves a node behind that would count as a run.
    RemoveUnusedNodesPass(),
    NameFloatLayers(),
    NameLayers(),
    LowerRows(),
    RemoveUnusedNodesPass(),
    RemoveUnusedOpsetsPass(),
    # Stack traces and module paths of the exporting machine do not belong in the file.
    ClearMetadataAndDocStringPass(),
    # An initializer may have come to share its name with an output.
    NameFixPass(),
)


def trace(
    model: Deployable,
    example_inputs: tuple[Tensor, ...],
    opset: int,
    corrections: Mapping[str, LayerResiduals] | None = None,
) -> ir.Model:
    """Export with the axes that the model leaves open.

    Args:
        model: as `swap.export_copy` or `swap.swapped_copy` returns it.
        example_inputs: as ``model.input_names``, a batch of at least 2 (torch would bake a batch
            of 1 into the graph).
        opset: version of the default operator set.
        corrections: of layers for every task, by dotted name.

    Returns:
        A model whose inputs are ``model.input_names`` and whose outputs are ``model.output_names``.
    """
    axes = model.dynamic_axes()
    sizes = {name: torch.export.Dim(name) for names in axes for name in names.values()}
    shapes = tuple({axis: sizes[name] for axis, name in names.items()} for names in axes)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            example_inputs,
            dynamo=True,
            opset_version=opset,
            input_names=model.input_names,
            output_names=model.output_names,
            dynamic_shapes=(shapes,),
            verbose=False,
        )
    assert program is not None  # only torch's legacy exporter returns nothing
    graph = program.model
    traced = list(graph.graph.initializers.values())
    for clean in (LowerCorrections(corrections or {}), *_CLEANING):
        clean(graph)
    # torch keeps the values of its last trace.
    for value in traced:
        if not value.is_initializer():
            value.const_value = None
    graph.producer_name = "epmq-deploy"
    graph.producer_version = __version__
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's console output away: prints go to our debug log, notices nowhere."""
    printed = io.StringIO()
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    # Below ERROR there are only notices, e.g. about packages this project does not use.
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            # These address torch's own developers.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            # Inputs share their axes on purpose.
            warnings.filterwarnings("ignore", message="# The axis name: .* will not be used")
            yield
    finally:
        logger.setLevel(level)
        if printed.getvalue():
            log.debug("torch.onnx: %s", printed.getvalue())
