"""DINOv2 (Oquab et al., arXiv 2304.07193) as ``transformers`` lays it out."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.models.blocks import Block, Group
from epmq_deploy.models.encoders.image_classifier import ImageClassifierFamily

_ATTENTION = (
    Group(("attention.q_proj", "attention.k_proj", "attention.v_proj"), norm="norm1"),
    Group(("attention.o_proj",)),
)
_PLAIN = (Group(("mlp.fc1",), norm="norm2"), Group(("mlp.fc2",)))
_GATED = (Group(("mlp.gate_proj", "mlp.up_proj"), norm="norm2"), Group(("mlp.down_proj",)))


class Dinov2Family(ImageClassifierFamily):
    """DINOv2, with and without registers, for classifying images.

    Heads are the experts' classifiers (``AutoModelForImageClassification``). They read ``[CLS]``
    and the mean of the patches, side by side, after the last norm; so every token reaches them.
    """

    name = "dinov2"
    model_types = ("dinov2", "dinov2_with_registers")
    architecture = (
        "hidden_size",
        "mlp_ratio",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
        "patch_size",
        "num_channels",
        "qkv_bias",
        "use_swiglu_ffn",
        "num_register_tokens",
    )
    prefixes = ("dinov2_with_registers.", "dinov2.")
    # From the names files have to those the loaded model has.
    renames = (
        ("attention.attention.query.", "attention.q_proj."),
        ("attention.attention.key.", "attention.k_proj."),
        ("attention.attention.value.", "attention.v_proj."),
        ("attention.output.dense.", "attention.o_proj."),
        ("mlp.weights_out.", "mlp.down_proj."),
    )
    deployed = ("embeddings.", "encoder.", "layernorm.")
    block_list = "encoder.layer"
    groups = (*_ATTENTION, *_PLAIN)
    reads_one_token = False
    model_options: Mapping[str, Any] = MappingProxyType({})

    def canonical_key(self, key: str) -> str | tuple[str, ...]:
        """Split the tensor in which files hold the gate and its input."""
        name = super().canonical_key(key)
        if isinstance(name, str) and "mlp.weights_in." in name:
            parts = ("mlp.gate_proj.", "mlp.up_proj.")
            return tuple(name.replace("mlp.weights_in.", part) for part in parts)
        return name

    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """Return the blocks, with or without a gated MLP."""
        blocks = super().blocks(model)
        if not hasattr(model.get_submodule(blocks[0].name).get_submodule("mlp"), "gate_proj"):
            return blocks
        return tuple(
            replace(
                block,
                groups=tuple(group.inside(block.name) for group in (*_ATTENTION, *_GATED)),
            )
            for block in blocks
        )

    def embed(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Concatenate ``[CLS]`` and the mean of the patches, without registers, ``[B, 2 D]``."""
        hidden: Tensor = model(pixel_values=inputs[0]).last_hidden_state
        registers: int = getattr(model.config, "num_register_tokens", 0)
        patches = hidden[:, 1 + registers :].mean(dim=1)
        return torch.cat([hidden[:, 0], patches], dim=1)


FAMILY = Dinov2Family()
