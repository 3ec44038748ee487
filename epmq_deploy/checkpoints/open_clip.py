"""Reading checkpoints of ``open_clip`` as the CLIP of ``transformers``.

Names and layout are those of open_clip's ``CLIP`` with a vision transformer: attention's query, key
and value are one tensor, projections are stored transposed (``x @ proj``).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from epmq_deploy.checkpoints.tensors import (
    ComputedTensor,
    Rename,
    TensorInfo,
    renamed,
    stored_tensors,
)
from epmq_deploy.checkpoints.wrappers import unwrapped
from epmq_deploy.errors import MismatchError, RecipeError

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
# Radford et al.'s values, the defaults of open_clip.
_MEAN = [0.48145466, 0.4578275, 0.40821073]
_STD = [0.26862954, 0.26130258, 0.27577711]
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
# Options that do not change what a model computes outside of training.
_IGNORED = {"patch_dropout", "output_tokens", "drop_path", "pad_id", "hf_tokenizer_name"}
_IGNORED |= {"tokenizer_kwargs", "init_logit_scale", "output_dict", "cast_dtype", "custom_text"}
# Options that are translated, with open_clip's defaults.
_VISION: Mapping[str, Any] = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
}
_TEXT: Mapping[str, Any] = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
}
_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
# Values that spell out the default.
_DEFAULTS: Mapping[str, Any] = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
}

_TOWERS = (
    ("visual.transformer.", "vision_model.encoder."),
    ("transformer.", "text_model.encoder."),
)
_IN_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}


@dataclass(frozen=True)
class _Transpose:
    """Computes the transpose of a stored matrix."""

    stored: TensorInfo

    def __call__(self) -> Tensor:
        return self.stored.load().T.contiguous()


def open_clip_tensors(file: Path, rename: Rename) -> dict[str, TensorInfo]:
    """List the tensors of an open_clip file by the names ``transformers``' CLIP has for them.

    Args:
        file: safetensors.
        rename: those names to canonical ones.

    Raises:
        MismatchError: it holds tensors CLIP does not have; names them.
    """
    tensors: dict[str, TensorInfo] = {}
    problems = []
    stored = stored_tensors([file])
    plain_name = unwrapped(stored.keys(), _without_text, _is_known, file)
    for key, info in stored.items():
        plain = plain_name(key)
        assert isinstance(plain, str), "prefixes alone are taken off"
        if plain in _TRANSPOSED:
            transposed = ComputedTensor(info.shape[::-1], info.dtype, _Transpose(info))
            parts: dict[str, TensorInfo] = {_TRANSPOSED[plain]: transposed}
        else:
            names = _names(plain)
            parts = {**renamed(info, names)} if names else {}
        if not parts:
            problems.append(f"{key} of shape {list(info.shape)}")
        for name, part in parts.items():
            canonical = rename(name)
            assert isinstance(canonical, str), "CLIP's own tensors are whole"
            tensors[canonical] = part
    if problems:
        raise MismatchError(f"{file}: tensors that CLIP does not have", problems)
    return tensors


def _without_text(key: str) -> str:
    """Return the name in a model with one class for both towers."""
    return key.removeprefix("text.")


def _is_known(plain: str) -> bool:
    return plain in _TRANSPOSED or bool(_names(plain))


def _names(key: str) -> tuple[str, ...]:
    if key in _OUTSIDE:
        return (_OUTSIDE[key],)
    for prefix, new_prefix in _TOWERS:
        match = re.fullmatch(rf"{re.escape(prefix)}resblocks\.(\d+)\.(.+)[._](weight|bias)", key)
        if match is None:
            continue
        block, module, kind = match.groups()
        start = f"{new_prefix}layers.{block}."
        if module == "attn.in_proj":
            return tuple(f"{start}self_attn.{part}_proj.{kind}" for part in "qkv")
        if module in _IN_BLOCKS:
            return (f"{start}{_IN_BLOCKS[module]}.{kind}",)
    return ()


def clip_config(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Translate ``open_clip_config.json`` to the ``config.json`` of ``transformers``' CLIP.

    Args:
        content: of the former.
        file: named in messages.

    Raises:
        RecipeError: it describes another architecture; names every option that does.
    """
    model = _section(content, "model_cfg", file)
    vision = {**_VISION, **_section(model, "vision_cfg", file)}
    text = {**_TEXT, **_section(model, "text_cfg", file)}
    if not isinstance(model.get("embed_dim"), int):
        raise RecipeError(f"{file}: no model_cfg.embed_dim")
    unsupported = _unsupported(model, _MODEL, "") + _unsupported(vision, _VISION, "vision_cfg.")
    unsupported += _unsupported(text, _TEXT, "text_cfg.")
    size = vision["image_size"]
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int):
        unsupported.append(f"vision_cfg.image_size: {size}")
    if not isinstance(vision["layers"], int):
        unsupported.append("vision_cfg.layers that is not a number (not a vision transformer)")
    if unsupported:
        raise RecipeError(
            f"{file}: not a CLIP with a vision transformer as transformers has it: "
            f"{', '.join(unsupported)}"
        )
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    shared = {"hidden_act": activation, "layer_norm_eps": 1e-5}
    vocabulary = text["vocab_size"]
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model["embed_dim"],
        "vision_config": shared
        | _tower(vision, vision["width"] // vision["head_width"])
        | {"model_type": "clip_vision_model", "image_size": size}
        | {"patch_size": vision["patch_size"], "projection_dim": model["embed_dim"]},
        "text_config": shared
        | _tower(text, text["heads"])
        | {"model_type": "clip_text_model", "vocab_size": vocabulary}
        | {"max_position_embeddings": text["context_length"]}
        # open_clip reads the embedding at the largest token id, which is the end of the text.
        | {"bos_token_id": vocabulary - 2}
        | {"eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
        | {"projection_dim": model["embed_dim"]},
    }


def _section(content: Mapping[str, Any], name: str, file: Path) -> Mapping[str, Any]:
    section = content.get(name)
    if not isinstance(section, dict):
        raise RecipeError(f"{file}: no {name}")
    return section


def _tower(settings: Mapping[str, Any], heads: int) -> dict[str, Any]:
    return {
        "hidden_size": settings["width"],
        "intermediate_size": int(settings["width"] * settings["mlp_ratio"]),
        "num_hidden_layers": settings["layers"],
        "num_attention_heads": heads,
    }


def _unsupported(settings: Mapping[str, Any], supported: Collection[str], prefix: str) -> list[str]:
    """List options that change what the model computes in ways ``transformers``' CLIP lacks."""
    return [
        f"{prefix}{name}: {value}"
        for name, value in settings.items()
        if name not in supported
        and name not in _IGNORED
        and value
        and value not in _DEFAULTS.get(name, ())
    ]


def processor_config(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Translate ``open_clip_config.json`` to a ``preprocessor_config.json``.

    Raises:
        RecipeError: images are preprocessed in a way the CLIP processor does not support.
    """
    settings = content.get("preprocess_cfg") or {}
    size = clip_config(content, file)["vision_config"]["image_size"]
    square = {"height": size, "width": size}
    mode = settings.get("resize_mode", "shortest")
    interpolation = settings.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or interpolation not in _RESAMPLE:
        raise RecipeError(
            f"{file}: preprocess_cfg with resize_mode {mode!r}, interpolation {interpolation!r}; "
            f"supported: shortest, squash; {', '.join(_RESAMPLE)}"
        )
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if mode == "shortest" else square,
        "resample": _RESAMPLE[interpolation],
        "do_center_crop": mode == "shortest",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": settings.get("mean", _MEAN),
        "image_std": settings.get("std", _STD),
    }
