"""Replace quantized layers by modules that export as low-bit nodes."""

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from epmq_deploy.exporters.lowering.int8.modules import Int8Conv2d, Int8Embedding
from epmq_deploy.exporters.lowering.layers import DOMAIN, LAYER_KEY, OP_TYPE
from epmq_deploy.exporters.packing.packed_linear import PackedLinear
from epmq_deploy.models.deployable import Deployable, MultiTaskModel
from epmq_deploy.models.head import TaskHead
from epmq_deploy.quantization.results import QuantizedLinear

D = TypeVar("D", bound=Deployable)


class MatMulNBitsLinear(nn.Module):
    """Stands in for one ``nn.Linear`` while the model is exported.

    Args:
        name: the layer's dotted name; it travels with the node.
        packed: the layer's codes and grid.
        bias: ``[N]`` or None; a following Add, which onnxruntime fuses (other runtimes disagree
            about the operator's own bias input).
        accuracy_level: the operator's attribute.
    """

    def __init__(
        self, name: str, packed: PackedLinear, bias: nn.Parameter | None, accuracy_level: int
    ) -> None:
        super().__init__()
        self.layer_name = name
        self.in_features = packed.in_features
        self.out_features = packed.codes.shape[0]
        self.bits = packed.bits
        self.block_size = packed.block_size
        self.accuracy_level = accuracy_level
        self.codes: Tensor
        self.scales: Tensor
        self.zero_points: Tensor | None
        self.register_buffer("codes", torch.from_numpy(packed.codes))
        self.register_buffer("scales", torch.from_numpy(packed.scales))
        zero_points = packed.zero_points
        self.register_buffer(
            "zero_points", None if zero_points is None else torch.from_numpy(zero_points)
        )
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The scales: models look at a layer's ``weight.dtype`` (T5 does), never at its values."""
        return self.scales

    def forward(self, x: Tensor) -> Tensor:
        """Emit the node: ``[..., K]`` to ``[..., N]``.

        Raises:
            RuntimeError: called outside of ``torch.onnx.export``, where it cannot compute.
        """
        if not torch.onnx.is_in_onnx_export():
            raise RuntimeError(f"{self.layer_name}: exists only to be exported, not to be run")
        inputs = [x, self.codes, self.scales]
        if self.zero_points is not None:
            inputs.append(self.zero_points)
        y = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OP_TYPE}",
            inputs,
            {
                "K": self.in_features,
                "N": self.out_features,
                "bits": self.bits,
                "block_size": self.block_size,
                "accuracy_level": self.accuracy_level,
            },
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
            metadata_props={LAYER_KEY: self.layer_name},
        )
        return y if self.bias is None else y + self.bias


def export_copy(model: D) -> D:
    """Return a copy that shares all tensors with ``model`` but no module, set up for export."""
    shared: dict[int, object] = {
        id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())
    }
    twin = copy.deepcopy(model, shared).eval()
    # Explicit attention exports to fewer nodes than SDPA's decomposition, and SDPA with a
    # dynamic sequence length does not export at all.
    set_attention = getattr(twin.backbone, "set_attn_implementation", None)
    if set_attention is not None:
        set_attention("eager")
    return twin


def swapped_copy(
    model: D,
    packed: Mapping[str, PackedLinear],
    rows: Mapping[str, QuantizedLinear],
    replaced: Mapping[str, Tensor],
    accuracy_level: int,
    heads: Mapping[str, TaskHead] | None = None,
) -> D:
    """Return a copy of ``model`` with replaced parameters and layers that export in low bits.

    Args:
        model: left as it is.
        packed: linear layers, by the backbone's dotted module name.
        rows: convolutions and embeddings likewise, 8 bits with one group per row.
        replaced: by the backbone's parameter name.
        accuracy_level: attribute of every node.
        heads: by task, in place of the model's.
    """
    twin = export_copy(model)
    if isinstance(twin, MultiTaskModel):
        twin.replace_heads(heads or {})
    for name, tensor in replaced.items():
        parent, leaf = _parent(twin.backbone, name)
        setattr(parent, leaf, nn.Parameter(tensor.detach().cpu(), requires_grad=False))
    for name, layer in packed.items():
        bias = twin.backbone.get_submodule(name).bias
        stand_in = MatMulNBitsLinear(name, layer, bias, accuracy_level)  # type: ignore[arg-type]
        replace_module(twin.backbone, name, stand_in)
    for name, quantized in rows.items():
        module = twin.backbone.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            replace_module(twin.backbone, name, Int8Conv2d(name, quantized, module))
        elif isinstance(module, nn.Embedding):
            replace_module(twin.backbone, name, Int8Embedding(name, quantized, module))
    return twin


def replace_module(backbone: nn.Module, name: str, stand_in: nn.Module) -> None:
    """Put a module in the place of another, at every path of that one."""
    old = backbone.get_submodule(name)
    paths = [path for path, one in backbone.named_modules(remove_duplicate=False) if one is old]
    for path in paths:
        parent, leaf = _parent(backbone, path)
        setattr(parent, leaf, stand_in)


def _parent(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
