"""Traces of models, each computed once in a run of the tests.

Tracing takes nine tenths of an export of a tiny model, and many tests export the same one. A trace
depends on the model, the shapes of its inputs, the operator set and corrections of tasks alone, so
where all of these are equal, down to each weight, the first trace is read back from the run's
temporary folder, which parallel workers share. `tests/exporters/graphs/test_remembered_traces.py`
compares the files that come of both.
"""

import hashlib
import io
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from epmq_deploy.exporters.graphs.trace import trace
from epmq_deploy.models.deployable import Deployable
from epmq_deploy.quantization.residuals.factors import LayerResiduals

Trace = Callable[..., ir.Model]

# Code of these packages stays what it is during a run; that of models with own code does not.
_PACKAGES = {"epmq_deploy", "torch", "transformers"}
# Where a model was loaded from, as transformers notes it; the graph does not say so.
_SOURCES = {"name_or_path", "_name_or_path"}


def remembering(folder: Path, compute: Trace = trace) -> Trace:
    """Return a function that traces as ``compute`` does, but the same model only once.

    Args:
        folder: an existing one, for the traces.
        compute: what traces.
    """

    def remembered(
        model: Deployable,
        example_inputs: tuple[Tensor, ...],
        opset: int,
        corrections: Mapping[str, LayerResiduals] | None = None,
    ) -> ir.Model:
        added = () if corrections is None else (corrections,)
        key = _key(model, example_inputs, opset, *added)
        if key is None:
            return compute(model, example_inputs, opset, *added)
        file = folder / f"{key}.onnx"
        if file.is_file():
            return ir.from_proto(onnx.ModelProto.FromString(file.read_bytes()))
        graph = compute(model, example_inputs, opset, *added)
        # Another worker must not read half a file.
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_bytes(ir.to_proto(graph).SerializeToString())
        partial.replace(file)
        return graph

    return remembered


def _key(
    model: Deployable, example_inputs: tuple[Tensor, ...], opset: int, *corrections: object
) -> str | None:
    """Return a hash of all that a trace depends on; None for code that may be another next time."""
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
    if not packages <= _PACKAGES:
        return None
    layouts = [(value.dtype, value.shape, value.stride()) for value in example_inputs]
    content = io.BytesIO()
    try:
        _Pickler(content).dump((model, layouts, opset, corrections))
    except (AttributeError, pickle.PicklingError, TypeError):
        return None
    return hashlib.sha256(content.getvalue()).hexdigest()


class _Pickler(pickle.Pickler):
    """Writes a tensor as a hash of its values, and a model without where it came from."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, set | frozenset):
            # Its order is another in each process.
            return "set", sorted(map(str, obj))
        if not isinstance(obj, Tensor):
            return None
        values = obj.detach().contiguous().flatten()
        content = values.view(torch.uint8).numpy().tobytes() if len(values) else b""
        layout = (type(obj).__name__, str(obj.dtype), tuple(obj.shape), obj.stride())
        return (*layout, hashlib.sha256(content).hexdigest())

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, PreTrainedConfig | PreTrainedModel):
            return NotImplemented
        state = {name: value for name, value in vars(obj).items() if name not in _SOURCES}
        return type, (type(obj).__qualname__, (), {}), (type(obj), state)
