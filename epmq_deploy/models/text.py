"""What text classifiers have in common: texts to token ids, padding, sequence lengths."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.errors import RecipeError
from epmq_deploy.models.encoders.classifier import ClassifierFamily
from epmq_deploy.models.loading import read_config
from epmq_deploy.models.tokenizer import open_tokenizer
from epmq_deploy.models.tokens import TokenWeights

_EXAMPLE_TOKENS = 8


class TextClassifierFamily(ClassifierFamily):
    """Encoders of texts.

    Texts are padded to the longest of their batch and cut at the tokenizer's ``model_max_length``
    or at the number of position embeddings, whichever is less; set ``model_max_length`` in the
    base's ``tokenizer_config.json`` to the length the experts were fine-tuned with.

    Attributes:
        tokenizer_files: what makes up the tokenizer where there is no ``tokenizer.json``.
    """

    modality = "text"
    input_names: tuple[str, ...] = ("input_ids", "attention_mask")
    tokenizer_files: tuple[str, ...] = ("vocab.txt",)

    def positions(self, config: dict[str, Any]) -> int:
        """The longest text the encoder takes, in tokens."""
        return int(config["max_position_embeddings"])

    def tokens(self, *inputs: Tensor, stream: str = "") -> TokenWeights:
        """Padding is not real; heads read the first token, where they read one."""
        mask = inputs[self.input_names.index("attention_mask")]
        first = torch.zeros(len(mask), dtype=torch.int64) if self.reads_one_token else None
        return TokenWeights(mask.bool(), first)

    def collate(self, folder: Path, samples: Sequence[Any]) -> tuple[Tensor, ...]:
        """Texts to token ids, mask and what else the encoder takes, each int64 ``[B, T]``.

        Raises:
            RecipeError: the tokenizer is missing or does not fit the model.
        """
        batch = self.tokenizer(folder)(
            list(samples),
            padding=True,
            truncation=True,
            return_token_type_ids="token_type_ids" in self.input_names,
            return_tensors="pt",
        )
        return tuple(batch[name].to(torch.int64) for name in self.input_names)

    def tokenizer(self, folder: Path) -> Any:
        """The folder's tokenizer, cutting texts at the length the encoder takes.

        Raises:
            RecipeError: it is missing or does not fit the model.
        """
        config = read_config(folder)
        return _tokenizer(
            folder, self.tokenizer_files, int(config["vocab_size"]), self.positions(config)
        )

    def example_inputs(self, folder: Path, batch: int) -> tuple[Tensor, ...]:
        """Random ids; the last sequence of a batch is padded, as those of real texts are."""
        config = read_config(folder)
        return example_texts(self.input_names, config, self.positions(config), batch)

    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """Any number of texts of any length."""
        return tuple({0: "batch", 1: "sequence"} for _ in self.input_names)


def example_texts(
    names: Sequence[str], config: dict[str, Any], positions: int, batch: int
) -> tuple[Tensor, ...]:
    """Random token ids, a mask and zeros for segments, int64 ``[batch, T]``, as ``names``.

    Args:
        names: of ``input_ids``, ``attention_mask`` and ``token_type_ids``.
        config: with ``vocab_size`` and, where padding has a token of its own, ``pad_token_id``.
        positions: the longest text the encoder takes.
        batch: number of texts; from two on the last one is padded.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(_EXAMPLE_TOKENS, positions)
    shape = (batch, length)
    ids = torch.randint(0, int(config["vocab_size"]), shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.int64)
    if batch > 1:
        mask[-1, length // 2 :] = 0
        ids[mask == 0] = int(config.get("pad_token_id") or 0)
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return tuple(made[name] for name in names)


@lru_cache(maxsize=4)
def _tokenizer(folder: Path, files: tuple[str, ...], vocabulary: int, positions: int) -> Any:
    tokenizer = open_tokenizer(folder, files, vocabulary, "texts need")
    if tokenizer.pad_token_id is None:
        raise RecipeError(f"{folder}: the tokenizer has no padding token")
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    # Positions count from the left, and the first token is read there.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer
