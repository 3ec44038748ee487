"""Read the quantized layers back from an exported file."""

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from epmq_deploy.errors import MismatchError
from epmq_deploy.exporters.formats import formats_of
from epmq_deploy.exporters.lowering.int8.rows import read_rows
from epmq_deploy.exporters.lowering.layers import layer_of
from epmq_deploy.quantization.results import QuantizedLinear

FORMAT_KEY = "epmq_deploy.format"


def read_codes(path: Path) -> dict[str, QuantizedLinear]:
    """Return the layers of an exported graph by dotted name, whatever its format.

    Codes are the solver's. ``bits`` is the container's width (4 or 8) and ``group_size`` the ONNX
    block size, so scales and zero points may be repeated; ``dequantize()`` equals the solver's
    bit for bit. Convolutions and embeddings have one group per row, codes of convolutions
    flattened to ``[N, C * kh * kw]``.

    Raises:
        MismatchError: the file does not say that one of our formats wrote it.
    """
    return dict(stored_layers(path))


def stored_layers(path: Path) -> Iterator[tuple[str, QuantizedLinear]]:
    """As `read_codes`, one layer in memory at a time; one with several runs comes as often."""
    model = ir.load(path)
    name = model.metadata_props.get(FORMAT_KEY)
    if name is None:
        raise MismatchError(str(path), [f"no {FORMAT_KEY} in its metadata: not exported by epmq"])
    (fmt,) = formats_of([name])
    for node, layer in fmt.read(model):
        yield layer_of(node), layer
    yield from read_rows(model.graph)
