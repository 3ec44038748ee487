"""Parts of onnxruntime, torch's exporter and transformers not documented as stable, each once.

`tests/exporters/test_compat.py` says when one of them changes.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache

# Where torch's exporter notes the modules a node comes from, outermost first.
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"


def float16_proto(model: onnx.ModelProto, keep: Sequence[str]) -> onnx.ModelProto:
    """Convert a model to float16 with onnxruntime's own tool (a module of ``transformers``).

    Checked with onnxruntime 1.31.

    Args:
        model: with all shapes, which are not inferred again: that would serialize the model.
        keep: inputs and outputs that stay in float32.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted: onnx.ModelProto = convert_float_to_float16(
        model, keep_io_types=list(keep), disable_shape_infer=True
    )
    return converted


def module_of(node: ir.Node) -> str | None:
    """Return the dotted name of the torch module that a node was traced from, if it is known.

    Read from metadata of torch's exporter, while it is still there. Checked with torch 2.13.
    """
    scopes = node.metadata_props.get(_SCOPES_KEY)
    # The last scope is the operation itself.
    return None if scopes is None else str(ast.literal_eval(scopes)[-2])


def filled_cache(pairs: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """Return a transformers cache that holds the keys and values of each block.

    Checked with transformers 5.23.

    Args:
        pairs: keys and values by block, ``[B, H, S, D]``.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        # Appending to the empty start would leave an operation in the graph.
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache
