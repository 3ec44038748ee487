"""A tiny random model in the layout of open_clip."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_zoo import FEATURES, SIZE, WIDTH
from torch import Tensor

HEADS, PATCH, LAYERS, WORDS, LENGTH = 2, 8, 2, 40, 10
MODEL = {
    "embed_dim": FEATURES,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": SIZE,
        "layers": LAYERS,
        "width": WIDTH,
        "head_width": WIDTH // HEADS,
        "mlp_ratio": 2.0,
        "patch_size": PATCH,
        "patch_dropout": 0.5,
        "pool_type": "tok",
    },
    "text_cfg": {
        "context_length": LENGTH,
        "vocab_size": WORDS,
        "width": WIDTH,
        "heads": HEADS,
        "layers": 1,
        "mlp_ratio": 2.0,
    },
}


def tower(start: str, layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one transformer's tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(layers):
        block = f"{start}resblocks.{index}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.weight": (WIDTH,), f"{block}{norm}.bias": (WIDTH,)}
        shapes |= {
            f"{block}attn.in_proj_weight": (3 * WIDTH, WIDTH),
            f"{block}attn.in_proj_bias": (3 * WIDTH,),
            f"{block}attn.out_proj.weight": (WIDTH, WIDTH),
            f"{block}attn.out_proj.bias": (WIDTH,),
            f"{block}mlp.c_fc.weight": (2 * WIDTH, WIDTH),
            f"{block}mlp.c_fc.bias": (2 * WIDTH,),
            f"{block}mlp.c_proj.weight": (WIDTH, 2 * WIDTH),
            f"{block}mlp.c_proj.bias": (WIDTH,),
        }
    return shapes


SHAPES = {
    "visual.class_embedding": (WIDTH,),
    "visual.positional_embedding": ((SIZE // PATCH) ** 2 + 1, WIDTH),
    "visual.proj": (WIDTH, FEATURES),
    "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
    **{
        f"visual.{norm}.{kind}": (WIDTH,)
        for norm in ("ln_pre", "ln_post")
        for kind in ("weight", "bias")
    },
    **tower("visual.transformer.", LAYERS),
    "token_embedding.weight": (WORDS, WIDTH),
    "positional_embedding": (LENGTH, WIDTH),
    "ln_final.weight": (WIDTH,),
    "ln_final.bias": (WIDTH,),
    "text_projection": (WIDTH, FEATURES),
    "logit_scale": (),
    **tower("transformer.", 1),
}


def random_tensors(seed: int = 0) -> dict[str, Tensor]:
    """A tiny random model."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in SHAPES.items()}


def write(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """A folder in open_clip's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    content = {"model_cfg": MODEL | changes, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder
