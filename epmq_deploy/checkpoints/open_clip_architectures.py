"""Architectures that ``open_clip`` knows by name: Radford et al. (arXiv 2103.00020) and ViT-H/14.

Numbers are those of open_clip's own model configurations; what is absent is its default.
"""

from collections.abc import Mapping
from typing import Any


def _model(
    embed: int, vision: Mapping[str, Any], text_width: int, text_layers: int = 12
) -> dict[str, Any]:
    text = {"context_length": 77, "vocab_size": 49408, "width": text_width}
    text |= {"heads": text_width // 64, "layers": text_layers}
    return {"embed_dim": embed, "vision_cfg": {"image_size": 224, **vision}, "text_cfg": text}


_LARGE = {"layers": 24, "width": 1024, "patch_size": 14}
_HUGE = {"layers": 32, "width": 1280, "head_width": 80, "patch_size": 14}
_GELU = {
    "ViT-B-32": _model(512, {"layers": 12, "width": 768, "patch_size": 32}, 512),
    "ViT-B-16": _model(512, {"layers": 12, "width": 768, "patch_size": 16}, 512),
    "ViT-L-14": _model(768, _LARGE, 768),
    "ViT-L-14-336": _model(768, _LARGE | {"image_size": 336}, 768),
    "ViT-H-14": _model(1024, _HUGE, 1024, 24),
}
# Name to ``model_cfg``. OpenAI's weights are of the quickgelu kind.
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = _GELU | {
    f"{name}-quickgelu": model | {"quick_gelu": True} for name, model in _GELU.items()
}
