"""Write an onnx-ir model: one file where protobuf allows it."""

from pathlib import Path

import onnx_ir as ir

# protobuf refuses messages of 2 GiB; the rest is room for everything but tensors.
PROTOBUF_LIMIT = 2**31 - 2**24


def write_model(model: ir.Model, path: Path, *, limit: int = PROTOBUF_LIMIT) -> int:
    """Save a model, its tensors in ``<path>_data`` if they exceed ``limit`` bytes.

    transformers.js and optimum look for external data under that name.

    Returns:
        Bytes written in all.
    """
    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    if size <= limit:
        ir.save(model, path)
        return path.stat().st_size
    data = path.with_name(f"{path.name}_data")
    ir.save(model, path, external_data=data.name)
    return path.stat().st_size + data.stat().st_size
