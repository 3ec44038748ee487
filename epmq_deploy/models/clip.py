"""CLIP (Radford et al., arXiv 2103.00020) as ``transformers`` lays it out: the image tower."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.tokens import TokenWeights
from epmq_deploy.models.family import Block, Group, ModelFamily
from epmq_deploy.models.image import image_processor, pixel_values
from epmq_deploy.models.loading import fill, read_config
from epmq_deploy.models.tokenizer import open_tokenizer

_ARCHITECTURE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "image_size",
    "patch_size",
)
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
    modality = "image"

    def recognises(self, config: dict[str, Any]) -> bool:
        """Whole CLIP models only: an image tower alone has no projection and no text side."""
        return config.get("model_type") == "clip"

    def config_problems(self, base: dict[str, Any], expert: dict[str, Any]) -> list[str]:
        """Compares what defines the image tower and tensors' shapes may not show."""
        from transformers import CLIPVisionConfig

        if not expert:
            return []
        # Published configs leave out what is as usual.
        usual = CLIPVisionConfig().to_dict()
        ours = usual | base.get("vision_config", {})
        theirs = usual | expert.get("vision_config", expert)
        return [
            f"{key} is {theirs[key]!r} in its config.json, the base has {ours[key]!r}"
            for key in _ARCHITECTURE
            if ours[key] != theirs[key]
        ]

    def is_deployed(self, key: str) -> bool:
        """The image tower and its projection; the text side only makes heads."""
        return key.startswith(("vision_model.", "visual_projection."))

    def is_optional(self, key: str) -> bool:
        """Image towers are published without the projection, which fine-tuning leaves alone."""
        return key.startswith("visual_projection.")

    def canonical_key(self, key: str) -> str:
        """See base."""
        if key == "logit_scale" or key.startswith(_TOP_LEVEL):
            return key
        return f"vision_model.{key}"

    def load(self, folder: Path) -> nn.Module:
        """The image tower with its projection."""
        from transformers import CLIPConfig, CLIPVisionModelWithProjection

        config = CLIPConfig.from_dict(read_config(folder))
        # The tower's own projection_dim is a default that published configs need not keep.
        config.vision_config.projection_dim = config.projection_dim
        model: nn.Module = CLIPVisionModelWithProjection(config.vision_config)
        return fill(model, folder)

    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """See base."""
        count = len(model.get_submodule("vision_model.encoder.layers"))  # type: ignore[arg-type]
        blocks = []
        for index in range(count):
            name = f"vision_model.encoder.layers.{index}"
            # Keys and values of the last block serve the class token too, and share their input
            # with its query; all that follows is per token.
            last = index == count - 1
            groups = (
                replace(group, pooled=last and position > 0)
                for position, group in enumerate(_GROUPS)
            )
            blocks.append(Block(name, tuple(group.inside(name) for group in groups)))
        return tuple(blocks)

    def tokens(self, *inputs: Tensor, stream: str = "") -> TokenWeights:
        """Heads read the class token, the first."""
        return TokenWeights(pooled=torch.zeros(inputs[0].shape[0], dtype=torch.int64))

    def embed(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Projected image features, unit length."""
        features: Tensor = model(pixel_values=inputs[0]).image_embeds
        unit: Tensor = features / features.norm(dim=-1, keepdim=True)
        return unit

    def collate(self, folder: Path, samples: Sequence[Any]) -> tuple[Tensor, ...]:
        """Images (anything PIL converts to RGB) to ``pixel_values [B, 3, H, W]``."""
        return (pixel_values(image_processor(folder), samples),)

    def example_inputs(self, folder: Path, batch: int) -> tuple[Tensor, ...]:
        """Random pixels at the tower's resolution."""
        config = read_config(folder)
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
        from transformers import CLIPConfig, CLIPModel

        config = CLIPConfig.from_dict(read_config(folder))
        tokenizer = open_tokenizer(
            folder,
            ("vocab.json", "merges.txt"),
            config.text_config.vocab_size,
            "heads from class names need",
        )
        model = fill(CLIPModel(config), folder).to(device)
        rows = []
        with torch.inference_mode():
            for name in classes:
                prompts = [template.replace("{}", name) for template in templates]
                tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
                embeds = model.get_text_features(
                    input_ids=tokens["input_ids"].to(device),
                    attention_mask=tokens["attention_mask"].to(device),
                ).pooler_output
                mean = (embeds / embeds.norm(dim=-1, keepdim=True)).mean(dim=0)
                rows.append(mean / mean.norm())
            head: Tensor = (torch.stack(rows) * model.logit_scale.exp()).cpu()
        return head


FAMILY = ClipFamily()
