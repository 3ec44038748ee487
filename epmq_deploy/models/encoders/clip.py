"""CLIP (Radford et al., arXiv 2103.00020) as ``transformers`` lays it out.

The image tower is deployed; the text tower makes heads from class names. Either or both are merged.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.files import uses_settings
from epmq_deploy.checkpoints.tensors import Rename
from epmq_deploy.models.base import ModelFamily
from epmq_deploy.models.blocks import Block, Group
from epmq_deploy.models.image_inputs import ImageInputs
from epmq_deploy.models.loading import TRANSFORMER_KEYS, config_differences, fill, read_config
from epmq_deploy.models.tokenizer import open_tokenizer
from epmq_deploy.models.tokens import TokenWeights

_ARCHITECTURE = {
    "vision": (*TRANSFORMER_KEYS, "image_size", "patch_size"),
    "text": (*TRANSFORMER_KEYS, "vocab_size", "max_position_embeddings"),
}
_IMAGE = ("vision_model.", "visual_projection.")
_TEXT = ("text_model.", "text_projection.", "logit_scale")
_IN_TOWERS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.", "final_layer_norm.")
_MERGED = {"image": _IMAGE, "text": _TEXT, "both": _IMAGE + _TEXT}
_GROUPS = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm="layer_norm1"),
    Group(("self_attn.out_proj",)),
    Group(("mlp.fc1",), norm="layer_norm2"),
    Group(("mlp.fc2",)),
)


class ClipFamily(ImageInputs, ModelFamily):
    """CLIP image towers with zero-shot heads from the text tower.

    Experts may be whole ``CLIPModel`` checkpoints or single towers (``CLIPVisionModel``,
    ``CLIPTextModel``, with or without projection), with or without the tower's prefix.

    Args:
        part: what is merged: ``image``, ``text`` or ``both``.
    """

    name = "clip"

    def __init__(self, part: str = "image") -> None:
        self._merged = _MERGED[part]
        self._towers = [tower for tower in ("vision", "text") if f"{tower}_model." in self._merged]
        self.merges_text_tower = "text" in self._towers

    def merging(self, part: str | None) -> "ClipFamily":
        """Return the family that merges one tower or both."""
        return self if part is None else ClipFamily(part)

    def recognises(self, config: dict[str, Any]) -> bool:
        """Whether it is a whole CLIP model: a single tower cannot make heads."""
        return config.get("model_type") == "clip"

    def config_problems(self, base: dict[str, Any], expert: dict[str, Any]) -> list[str]:
        """Compare the settings of the merged towers, some of which no tensor's shape shows."""
        from transformers import CLIPTextConfig, CLIPVisionConfig

        problems = []
        for tower in self._towers:
            described = _tower_config(expert, tower)
            if not described:
                continue
            # Published configs leave out default values.
            defaults = (CLIPVisionConfig() if tower == "vision" else CLIPTextConfig()).to_dict()
            problems += config_differences(
                _ARCHITECTURE[tower],
                defaults | base.get(f"{tower}_config", {}),
                defaults | described,
            )
        return problems

    def is_deployed(self, key: str) -> bool:
        """Whether it belongs to the image tower or its projection."""
        return key.startswith(_IMAGE)

    def is_merged(self, key: str) -> bool:
        """Whether it belongs to a merged tower or its projection."""
        return key.startswith(self._merged)

    def part_problems(self, tensors: Collection[str]) -> list[str]:
        """Name every tower to be merged that no expert holds."""
        return [
            f"base.part asks for the {tower} tower, which no expert holds"
            for tower in self._towers
            if not any(key.startswith(f"{tower}_model.") for key in tensors)
        ]

    def is_known(self, key: str) -> bool:
        """Whether it is a part of the model, with the prefix that ``canonical_key`` gives it."""
        tower, _, rest = key.partition(".")
        return not tower.endswith("_model") or rest.startswith(_IN_TOWERS)

    def is_optional(self, key: str) -> bool:
        """Whether it is a projection: towers are published without, and fine-tuning leaves them."""
        return key.startswith(("visual_projection.", "text_projection.", "logit_scale"))

    def canonical_key(self, key: str) -> str:
        """Return the name with the image tower's prefix, which single towers leave out."""
        return key if key.startswith(_IMAGE + _TEXT) else f"vision_model.{key}"

    def expert_rename(self, config: dict[str, Any]) -> Rename:
        """Rename for an expert; single text towers may leave out their prefix."""
        if config.get("model_type") != "clip_text_model":
            return self.canonical_key
        return lambda key: key if key.startswith(_TEXT) else f"text_model.{key}"

    @uses_settings
    def load(self, folder: Path) -> nn.Module:
        """Load the image tower with its projection."""
        from transformers import CLIPConfig, CLIPVisionModelWithProjection

        config = CLIPConfig.from_dict(read_config(folder))
        # The tower's own projection_dim is a default that published configs need not keep.
        config.vision_config.projection_dim = config.projection_dim
        model: nn.Module = CLIPVisionModelWithProjection(config.vision_config)
        return fill(model, folder)

    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """Return the image tower's blocks."""
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
        """Return that heads read the class token, the first."""
        return TokenWeights(pooled=torch.zeros(inputs[0].shape[0], dtype=torch.int64))

    def embed(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Compute projected image features of unit length."""
        features: Tensor = model(pixel_values=inputs[0]).image_embeds
        unit: Tensor = features / features.norm(dim=-1, keepdim=True)
        return unit

    @uses_settings
    def example_inputs(self, folder: Path, batch: int) -> tuple[Tensor, ...]:
        """Return random pixels at the tower's resolution."""
        config = read_config(folder)
        vision = config.get("vision_config", config)
        size, channels = vision.get("image_size", 224), vision.get("num_channels", 3)
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(batch, channels, size, size, generator=generator),)

    @uses_settings
    def zero_shot_head(
        self,
        folder: Path,
        classes: Sequence[str],
        templates: Sequence[str],
        device: torch.device,
        expert: Checkpoint | None = None,
    ) -> Tensor:
        """Average each class's unit prompt embeddings; scale the unit mean by the logit scale.

        Prompt ensembling as in the CLIP paper (section 3.1.4), with the expert's text tower where
        that is merged.
        """
        from transformers import CLIPConfig, CLIPModel

        config = CLIPConfig.from_dict(read_config(folder))
        tokenizer = open_tokenizer(
            folder,
            ("vocab.json", "merges.txt"),
            config.text_config.vocab_size,
            "heads from class names need",
        )
        model = fill(CLIPModel(config), folder)
        for name, parameter in model.named_parameters():
            if expert is not None and name in expert.tensors and self.is_merged(name):
                expert.load_into(name, parameter.data)
        model = model.to(device)
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


def _tower_config(config: dict[str, Any], tower: str) -> dict[str, Any]:
    """Return a config's settings of one tower: a section, the whole config, or nothing."""
    kind = config.get("model_type")
    if kind in ("clip_vision_model", "clip_text_model"):
        return config if kind == f"clip_{tower}_model" else {}
    section: dict[str, Any] = config.get(f"{tower}_config", config if tower == "vision" else {})
    return section


FAMILY = ClipFamily()
