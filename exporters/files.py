"""Write an onnx-ir model: one file where protobuf allows it."""

from pathlib import Path

import onnx_ir as ir

# protobuf refuses messages of 2 GiB; the rest is room for everything but tensors.
_PROTOBUF_LIMIT = 2**31 - 2**24


def write_model(model: ir.Model, path: Path, *, limit: int = _PROTOBUF_LIMIT) -> int:
    """Save a model, its tensors in ``<path>.data`` if they exceed ``limit`` bytes.

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
    data = path.with_name(f"{path.name}.data")
    ir.save(model, path, external_data=data.name)
    return path.stat().st_size + data.stat().st_size
