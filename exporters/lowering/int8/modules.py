"""Modules that stand in for convolutions and embedding tables while the model is exported."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from epmq_deploy.exporters.lowering.int8.rows import DEQUANTIZE, LOOK_UP, ROWS_DOMAIN, signed_codes
from epmq_deploy.exporters.lowering.layers import LAYER_KEY
from epmq_deploy.quantization.results import QuantizedLinear


class _Int8Rows(nn.Module):
    """Codes and scales of one layer, which become nodes of `exporters.lowering.int8.rows`.

    Args:
        name: the layer's dotted name; it travels with the nodes.
        layer: 8 bits, symmetric, one group per row.
        shape: the float weight's, ``[N, ...]``.
    """

    def __init__(self, name: str, layer: QuantizedLinear, shape: Sequence[int]) -> None:
        super().__init__()
        self.layer_name = name
        self.codes: Tensor
        self.scales: Tensor
        self.register_buffer("codes", signed_codes(layer).reshape(tuple(shape)))
        # torch keeps the buffers of its last trace; the layer's own may be mapped with all others'.
        self.register_buffer("scales", layer.scales.cpu().clone())

    @property
    def weight(self) -> Tensor:
        """The whole weight, for models that do more with it than call the layer.

        A node of its own; where only its dtype is looked at, the node is unused and dropped.

        Raises:
            RuntimeError: read outside of ``torch.onnx.export``.
        """
        return self._node(DEQUANTIZE, [self.codes, self.scales], self.codes.shape)

    def _node(
        self, op_type: str, inputs: Sequence[Tensor], shape: Sequence[int | torch.SymInt]
    ) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            raise RuntimeError(f"{self.layer_name}: exists only to be exported, not to be run")
        return torch.onnx.ops.symbolic(
            f"{ROWS_DOMAIN}::{op_type}",
            inputs,
            # Without it the optimizer takes small tables with equal rows for one.
            {"layer": self.layer_name},
            dtype=torch.float32,
            shape=shape,
            version=1,
            metadata_props={LAYER_KEY: self.layer_name},
        )


class Int8Conv2d(_Int8Rows):
    """Stands in for one ``nn.Conv2d`` with zero padding.

    Args:
        name: the layer's dotted name.
        layer: codes ``[N, C * kh * kw]``.
        conv: what it replaces; only geometry and bias are kept.
    """

    def __init__(self, name: str, layer: QuantizedLinear, conv: nn.Conv2d) -> None:
        super().__init__(name, layer, conv.weight.shape)
        self.bias = conv.bias
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, N, H', W']``."""
        return functional.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Int8Embedding(_Int8Rows):
    """Stands in for one ``nn.Embedding``.

    Args:
        name: the layer's dotted name.
        layer: codes ``[V, D]``.
        embedding: what it replaces.
    """

    def __init__(self, name: str, layer: QuantizedLinear, embedding: nn.Embedding) -> None:
        super().__init__(name, layer, embedding.weight.shape)
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding.embedding_dim
        self.padding_idx = embedding.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Emit the look-up: integer ids ``[...]`` to float32 ``[..., D]``."""
        shape = (*ids.shape, self.embedding_dim)
        return self._node(LOOK_UP, [self.codes, self.scales, ids], shape)
