"""Writing graphs without a second copy of their tensors."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from epmq_deploy.errors import NumericsError
from epmq_deploy.exporters.files import outline, write_model
from epmq_deploy.exporters.verification.kernels import verify_valid


@pytest.mark.parametrize("fmt", ["fp32", "fp16", "matmulnbits", "qdq", "int8-expand"])
def test_file_is_that_of_onnx_ir(exported, fmt: str, tmp_path: Path) -> None:
    model = ir.load(exported.graphs[fmt].path)
    ir.save(model, tmp_path / "expected.onnx")
    size = write_model(model, tmp_path / "written.onnx")
    written = (tmp_path / "written.onnx").read_bytes()
    assert written == (tmp_path / "expected.onnx").read_bytes()
    assert size == len(written)


def test_outline_leaves_tensors_where_they_are(exported) -> None:
    model = ir.load(exported.graphs["fp32"].path)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    proto = outline(model)
    assert proto.ByteSize() < exported.graphs["fp32"].path.stat().st_size / 2
    after = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert all(after[name] is before[name] for name in before)


def test_tensor_that_writes_too_little(exported, tmp_path: Path) -> None:
    class Short(ir.Tensor):
        def tofile(self, file) -> None:
            file.write(self.tobytes()[:-1])

    model = ir.load(exported.graphs["fp32"].path)
    name, value = max(model.graph.initializers.items(), key=lambda item: item[1].const_value.nbytes)
    value.const_value = Short(value.const_value.numpy(), name=name)
    size = value.const_value.nbytes
    with pytest.raises(ValueError, match=f"{size - 1} bytes instead of {size}"):
        write_model(model, tmp_path / "written.onnx")


def test_shapes_that_do_not_fit_are_found_before_writing(exported) -> None:
    model = ir.load(exported.graphs["fp32"].path)
    verify_valid(model, "model.onnx")
    product = next(node for node in model.graph if node.op_type == "MatMul")
    weight = product.inputs[1]
    wrong = ir.Tensor(np.zeros((weight.shape[0] + 1, 512), np.float32), name=weight.name)
    weight.const_value, weight.shape = wrong, wrong.shape
    with pytest.raises(NumericsError, match=r"model\.onnx is not a valid ONNX model"):
        verify_valid(model, "model.onnx")
