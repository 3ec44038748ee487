"""BERT encoders (Devlin et al., arXiv 1810.04805) as ``transformers`` lays them out."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.tokens import TokenWeights
from epmq_deploy.checkpoints import Checkpoint
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.family import Block, Group, ModelFamily
from epmq_deploy.models.head import TaskHead
from epmq_deploy.models.loading import fill
from epmq_deploy.models.tokenizer import open_tokenizer

_ARCHITECTURE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "max_position_embeddings",
    "type_vocab_size",
    "vocab_size",
)
_HEAD = {
    "weight": "classifier.weight",
    "bias": "classifier.bias",
    "pooler_weight": "pooler.dense.weight",
    "pooler_bias": "pooler.dense.bias",
}
# Blocks normalise after each residual sum: what feeds query, key and value is the last norm of the
# block before, or the embeddings'.
_GROUPS = (
    Group(("attention.self.query", "attention.self.key", "attention.self.value")),
    Group(("attention.output.dense",)),
    Group(("intermediate.dense",), norm="attention.output.LayerNorm"),
    Group(("output.dense",)),
)
_EXAMPLE_TOKENS = 8


class BertFamily(ModelFamily):
    """BERT and what shares its layout (MiniLM), for classifying texts.

    Embeddings and encoder are merged and deployed. Pooler and classifier are the task's head: each
    expert (``AutoModelForSequenceClassification``) keeps its own.

    Texts are padded to the longest of their batch and cut at the tokenizer's ``model_max_length``
    or at the number of position embeddings, whichever is less; set ``model_max_length`` in the
    base's ``tokenizer_config.json`` to the length the experts were fine-tuned with.
    """

    name = "bert"
    input_names = ("input_ids", "attention_mask", "token_type_ids")
    modality = "text"
    experts_carry_heads = True

    def recognises(self, config: dict[str, Any]) -> bool:
        """By model type."""
        return config.get("model_type") == "bert"

    def config_problems(self, base: dict[str, Any], expert: dict[str, Any]) -> list[str]:
        """Compares what defines the encoder."""
        return [
            f"{key} is {expert[key]!r} in its config.json, the base has {base[key]!r}"
            for key in _ARCHITECTURE
            if key in base and key in expert and base[key] != expert[key]
        ]

    def is_deployed(self, key: str) -> bool:
        """Embeddings and encoder."""
        return key.startswith(("embeddings.", "encoder."))

    def is_optional(self, key: str) -> bool:
        """Every expert holds the whole encoder."""
        return False

    def is_head(self, key: str) -> bool:
        """Pooler and classifier."""
        return key.startswith(("pooler.", "classifier."))

    def canonical_key(self, key: str) -> str:
        """Without the ``bert.`` prefix, LayerNorms as ``weight`` and ``bias``.

        Checkpoints converted from the original release call these ``gamma`` and ``beta``.
        """
        key = key.removeprefix("bert.")
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            if key.endswith(f"LayerNorm{old}"):
                return key.removesuffix(old) + new
        return key

    def load(self, folder: Path) -> nn.Module:
        """Embeddings and encoder, without pooler.

        Raises:
            RecipeError: a variant of BERT that ``transformers`` would run as the plain one.
        """
        from transformers import BertConfig, BertModel

        settings = _config(folder)
        positions = settings.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise RecipeError(
                f"{folder}: position_embedding_type {positions!r} is not supported, only 'absolute'"
            )
        if settings.get("is_decoder") or settings.get("add_cross_attention"):
            raise RecipeError(f"{folder}: BERT as a decoder is not supported, only as an encoder")
        config = BertConfig.from_pretrained(folder, local_files_only=True)
        model: nn.Module = BertModel(config, add_pooling_layer=False)
        return fill(model, folder, self.canonical_key)

    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """See base."""
        count = len(model.get_submodule("encoder.layer"))  # type: ignore[arg-type]
        blocks = []
        for index in range(count):
            name = f"encoder.layer.{index}"
            # Keys and values of the last block serve [CLS] too, and share their input with its
            # query; all that follows is per token.
            last = index == count - 1
            groups = (
                replace(group, pooled=last and position > 0)
                for position, group in enumerate(_GROUPS)
            )
            inside = tuple(group.inside(name) for group in groups)
            blocks.append(Block(name, inside, norm=f"{name}.output.LayerNorm"))
        return tuple(blocks)

    def tokens(self, *inputs: Tensor) -> TokenWeights:
        """Padding is not real; heads read ``[CLS]``, the first token."""
        mask = inputs[self.input_names.index("attention_mask")]
        return TokenWeights(mask.bool(), torch.zeros(len(mask), dtype=torch.int64))

    def embed(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """The last layer's hidden state at ``[CLS]``."""
        named = dict(zip(self.input_names, inputs, strict=True))
        hidden: Tensor = model(**named).last_hidden_state
        return hidden[:, 0]

    def collate(self, folder: Path, samples: Sequence[Any]) -> tuple[Tensor, ...]:
        """Texts to token ids, mask and segment ids, each int64 ``[B, T]``."""
        batch = _tokenizer(folder)(
            list(samples),
            padding=True,
            truncation=True,
            return_token_type_ids=True,
            return_tensors="pt",
        )
        return tuple(batch[name].to(torch.int64) for name in self.input_names)

    def example_inputs(self, folder: Path, batch: int) -> tuple[Tensor, ...]:
        """Random ids; the last sequence of a batch is padded, as those of real texts are."""
        config = _config(folder)
        generator = torch.Generator().manual_seed(0)
        length = min(_EXAMPLE_TOKENS, int(config["max_position_embeddings"]))
        shape = (batch, length)
        ids = torch.randint(0, int(config["vocab_size"]), shape, generator=generator)
        mask = torch.ones(shape, dtype=torch.int64)
        if batch > 1:
            mask[-1, length // 2 :] = 0
        return ids, mask, torch.zeros(shape, dtype=torch.int64)

    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """Any number of texts of any length."""
        return tuple({0: "batch", 1: "sequence"} for _ in self.input_names)

    def expert_head(self, expert: Checkpoint) -> TaskHead | None:
        """Pooler and classifier of ``BertForSequenceClassification``.

        Raises:
            RecipeError: one of the two is not there, or no bias of one.
        """
        held = {part: name for part, name in _HEAD.items() if name in expert.tensors}
        if not any(part in held for part in ("weight", "bias")):
            return None
        missing = [name for part, name in _HEAD.items() if part not in held]
        if missing:
            raise RecipeError(
                f"{expert.folder}: its head lacks {', '.join(missing)}; save the expert with "
                "AutoModelForSequenceClassification"
            )
        return TaskHead.of_tensors({part: expert.load(name) for part, name in held.items()})

    def zero_shot_head(
        self,
        folder: Path,
        classes: Sequence[str],
        templates: Sequence[str],
        device: torch.device,
    ) -> Tensor:
        """See base."""
        raise RecipeError(
            "BERT has no head for class names; leave out head to take the expert's classifier, or "
            "give a matrix"
        )


def _config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Any:
    config = _config(folder)
    tokenizer = open_tokenizer(folder, ("vocab.txt",), int(config["vocab_size"]), "texts need")
    if tokenizer.pad_token_id is None:
        raise RecipeError(f"{folder}: the tokenizer has no padding token")
    tokenizer.model_max_length = min(
        tokenizer.model_max_length, int(config["max_position_embeddings"])
    )
    # Positions count from the left, and [CLS] is read there.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


FAMILY = BertFamily()
