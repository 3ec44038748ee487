"""CLIP (Radford et al., arXiv 2103.00020) as ``transformers`` lays it out: the image tower."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.models.family import Block, Group, ModelFamily
from epmq_deploy.models.loading import fill

_TOP_LEVEL = ("vision_model.", "text_model.", "visual_projection.", "text_projection.")
_GROUPS = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm="layer_norm1"),
    Group(("self_attn.out_proj",)),
    Group(("mlp.fc1",), norm="layer_norm2"),
    Group(("mlp.fc2",)),
)


class ClipFamily(ModelFamily):
    """CLIP image towers with zero-shot heads from the base's text tower.

    Experts may be whole ``CLIPModel`` checkpoints or image towers (``CLIPVisionModel``), with or
    without the ``vision_model.`` prefix.
    """

    name = "clip"
    input_names = ("pixel_values",)

    def recognises(self, config: dict[str, Any]) -> bool:
        """See base."""
        return config.get("model_type") in ("clip", "clip_vision_model")

    def canonical_key(self, key: str) -> str:
        """See base."""
        if key == "logit_scale" or key.startswith(_TOP_LEVEL):
            return key
        return f"vision_model.{key}"

    def load(self, folder: Path) -> nn.Module:
        """The image tower with its projection."""
        from transformers import CLIPConfig, CLIPVisionModelWithProjection

        config = CLIPConfig.from_pretrained(folder, local_files_only=True)
        # The tower's own projection_dim is a default that published configs need not keep.
        config.vision_config.projection_dim = config.projection_dim
        model: nn.Module = CLIPVisionModelWithProjection(config.vision_config)
        return fill(model, folder)

    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """See base."""
        count = len(model.get_submodule("vision_model.encoder.layers"))  # type: ignore[arg-type]
        names = (f"vision_model.encoder.layers.{index}" for index in range(count))
        return tuple(Block(name, tuple(group.inside(name) for group in _GROUPS)) for name in names)

    def embed(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Projected image features, unit length."""
        features: Tensor = model(pixel_values=inputs[0]).image_embeds
        unit: Tensor = features / features.norm(dim=-1, keepdim=True)
        return unit

    def collate(self, folder: Path, samples: Sequence[Any]) -> tuple[Tensor, ...]:
        """Images (anything PIL converts to RGB) to ``pixel_values [B, 3, H, W]``."""
        images = [sample.convert("RGB") for sample in samples]
        batch = _image_processor(folder)(images=images, return_tensors="pt")
        return (batch["pixel_values"],)

    def example_inputs(self, folder: Path, batch: int) -> tuple[Tensor, ...]:
        """Random pixels at the tower's resolution."""
        config = json.loads((folder / "config.json").read_text())
        vision = config.get("vision_config", config)
        size, channels = vision.get("image_size", 224), vision.get("num_channels", 3)
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(batch, channels, size, size, generator=generator),)

    def zero_shot_head(
        self,
        folder: Path,
        classes: Sequence[str],
        templates: Sequence[str],
        device: torch.device,
    ) -> Tensor:
        """Per class the mean of its prompts' unit embeddings, as unit vector times the logit scale.

        As in the CLIP paper's prompt ensembling (section 3.1.4).
        """
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        model = fill(CLIPModel(CLIPConfig.from_pretrained(folder, local_files_only=True)), folder)
        model = model.to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        rows = []
        with torch.inference_mode():
            for name in classes:
                prompts = [template.format(name) for template in templates]
                tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
                embeds = model.get_text_features(
                    input_ids=tokens["input_ids"].to(device),
                    attention_mask=tokens["attention_mask"].to(device),
                ).pooler_output
                mean = (embeds / embeds.norm(dim=-1, keepdim=True)).mean(dim=0)
                rows.append(mean / mean.norm())
            head: Tensor = (torch.stack(rows) * model.logit_scale.exp()).cpu()
        return head


@lru_cache(maxsize=4)
def _image_processor(folder: Path) -> Any:
    # Pillow's resampling, never torchvision's: the same pixels on every machine.
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    settings = json.loads((folder / "preprocessor_config.json").read_text())
    return CLIPImageProcessorPil.from_dict(settings)


FAMILY = ClipFamily()
