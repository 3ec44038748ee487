"""Write an onnx-ir model: one file where protobuf allows it, tensor by tensor."""

from collections.abc import Mapping
from io import SEEK_END, BufferedWriter
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx_ir as ir

from epmq_deploy.checkpoints.memory_map import release_mapped

# protobuf refuses messages of 2 GiB; the rest is room for everything but tensors.
PROTOBUF_LIMIT = 2**31 - 2**24

# Bytes up to which a tensor stays in the outline: shape inference reads small ones.
_SMALL = 1024

_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
_LENGTH_DELIMITED = 2


def write_model(model: ir.Model, path: Path, *, limit: int = PROTOBUF_LIMIT) -> int:
    """Save a model, its tensors in ``<path>_data`` if they exceed ``limit`` bytes.

    transformers.js and optimum look for external data under that name. Memory holds one tensor at
    a time besides the model's own.

    Returns:
        Bytes written in all.
    """
    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    if size <= limit:
        _write_one_file(model, path)
        return path.stat().st_size
    data = path.with_name(f"{path.name}_data")
    ir.save(model, path, external_data=data.name)
    return path.stat().st_size + data.stat().st_size


def outline(model: ir.Model) -> onnx.ModelProto:
    """Return a model as protobuf, with all but small tensors as external data of no file."""
    held = [
        (value, value.const_value)
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and value.const_value.nbytes > _SMALL
        and value.const_value.dtype != ir.DataType.STRING
    ]
    try:
        for value, tensor in held:
            value.const_value = ir.ExternalTensor(
                "",
                None,
                None,
                tensor.dtype,
                shape=tensor.shape,  # type: ignore[arg-type]
                name=str(value.name),
                doc_string=tensor.doc_string,
            )
        return ir.to_proto(model)
    finally:
        for value, tensor in held:
            value.const_value = tensor


def weightless(model: ir.Model) -> onnx.ModelProto:
    """Return a model as protobuf, in which large tensors are inputs of their type and shape."""
    proto = outline(model)
    small = []
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
        else:
            small.append(tensor)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(small)
    return proto


class _Entry(NamedTuple):
    """One initializer's message: what precedes its values, the tensor with them, and the rest."""

    start: bytes
    tensor: ir.TensorProtocol | None
    end: bytes

    @property
    def size(self) -> int:
        """Bytes of the message."""
        values = 0 if self.tensor is None else self.tensor.nbytes
        return len(self.start) + values + len(self.end)


def _write_one_file(model: ir.Model, path: Path) -> None:
    """Write what ``ir.save`` would, without a copy of the tensors in memory.

    protobuf writes fields in order of their numbers: a message with one large field is what comes
    before it, the field, and what comes behind it.
    """
    proto = outline(model)
    entries = [_entry(tensor, model.graph.initializers) for tensor in proto.graph.initializer]
    model_start, model_end = _around(proto, _GRAPH)
    start, end = _around(proto.graph, _INITIALIZER)
    size = len(start) + len(end)
    size += sum(len(_prefix(_INITIALIZER, entry.size)) + entry.size for entry in entries)
    with path.open("wb") as file:
        file.write(model_start + _prefix(_GRAPH, size) + start)
        for entry in entries:
            file.write(_prefix(_INITIALIZER, entry.size) + entry.start)
            if entry.tensor is not None:
                _write_values(entry.tensor, file)
            file.write(entry.end)
        file.write(end + model_end)


def _entry(outlined: onnx.TensorProto, values: Mapping[str, ir.Value]) -> _Entry:
    if outlined.data_location != onnx.TensorProto.EXTERNAL:
        return _Entry(outlined.SerializeToString(), None, b"")
    tensor = values[outlined.name].const_value
    assert tensor is not None, "it was outlined"
    plain = onnx.TensorProto()
    plain.CopyFrom(outlined)
    plain.ClearField("data_location")
    plain.ClearField("external_data")
    start, end = _around(plain, _RAW_DATA)
    return _Entry(start + _prefix(_RAW_DATA, tensor.nbytes), tensor, end)


def _write_values(tensor: ir.TensorProtocol, file: BufferedWriter) -> None:
    # Some tensors write to the descriptor, past the buffer.
    file.flush()
    start = file.tell()
    tensor.tofile(file)  # type: ignore[attr-defined]  # all have it, the protocol lacks it
    release_mapped()
    file.seek(0, SEEK_END)
    if file.tell() - start != tensor.nbytes:
        written = file.tell() - start
        raise ValueError(f"tensor {tensor.name}: {written} bytes instead of {tensor.nbytes}")


def _around(
    message: onnx.ModelProto | onnx.GraphProto | onnx.TensorProto, number: int
) -> tuple[bytes, bytes]:
    """Return the fields of a message before and behind one of them, serialized."""
    before, behind = type(message)(), type(message)()
    before.CopyFrom(message)
    behind.CopyFrom(message)
    for known in message.DESCRIPTOR.fields:
        if known.number >= number:
            before.ClearField(known.name)
        if known.number <= number:
            behind.ClearField(known.name)
    return before.SerializeToString(), behind.SerializeToString()


def _prefix(number: int, size: int) -> bytes:
    """Return what comes before the ``size`` bytes of a message's field: its key and its length."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(size)


def _varint(value: int) -> bytes:
    """Return an integer as protobuf writes it: seven bits a byte, lowest first."""
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])
