"""How texts become token ids and masks."""

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.checkpoints.files import uses_settings
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.inputs import ModelInputs
from epmq_deploy.models.loading import read_config
from epmq_deploy.models.shared_tokenizer import SharedTokenizer
from epmq_deploy.models.tokenizer import open_tokenizer

log = logging.getLogger(__name__)

_EXAMPLE_TOKENS = 8


class TextInputs(ModelInputs):
    """Texts, or pairs of texts, right-padded.

    A pair is one sequence, its parts told apart as the tokenizer does (separators, segments). Texts
    are padded to the longest of their batch and cut, of a pair the longer text first, at the
    tokenizer's ``model_max_length`` or at the number of position embeddings, whichever is less; set
    ``model_max_length`` in the base's ``tokenizer_config.json`` to the length the experts were
    fine-tuned with.

    Attributes:
        tokenizer_files: of a tokenizer that is not stored as ``tokenizer.json``.
        pads_with_end: whether the end of a text pads where there is no padding token; what is
            padded is masked in any case.
    """

    modality = "text"
    input_names: tuple[str, ...] = ("input_ids", "attention_mask")
    tokenizer_files: tuple[str, ...] = ("vocab.txt",)
    pads_with_end: bool = False

    def positions(self, config: dict[str, Any]) -> int:
        """Return the length of the longest text the encoder takes, in tokens."""
        return int(config["max_position_embeddings"])

    def vocabulary(self, config: dict[str, Any]) -> int:
        """Return the number of tokens that the model has embeddings of."""
        return int(config["vocab_size"])

    def collate(self, folder: Path, samples: Sequence[Any]) -> tuple[Tensor, ...]:
        """Turn texts into token ids, mask and segments as ``input_names``, int64 ``[B, T]``.

        Args:
            folder: a model folder with a tokenizer.
            samples: texts, or pairs of texts, not both.

        Raises:
            RecipeError: the tokenizer is missing or does not fit the model.
        """
        texts, seconds = list(samples), None
        if isinstance(texts[0], tuple):
            texts, seconds = map(list, zip(*texts, strict=True))
        batch = self.tokenizer(folder)(
            texts,
            seconds,
            padding=True,
            truncation=True,
            return_token_type_ids="token_type_ids" in self.input_names,
            return_tensors="pt",
        )
        return tuple(batch[name].to(torch.int64) for name in self.input_names)

    @uses_settings
    def tokenizer(self, folder: Path) -> Any:
        """Return the folder's tokenizer, which cuts texts at the length the encoder takes.

        Raises:
            RecipeError: it is missing or does not fit the model.
        """
        config = read_config(folder)
        return _tokenizer(
            folder,
            self.tokenizer_files,
            self.vocabulary(config),
            self.positions(config),
            pads_with_end=self.pads_with_end,
        )

    @uses_settings
    def example_inputs(self, folder: Path, batch: int) -> tuple[Tensor, ...]:
        """Return random ids; the last sequence of a batch is padded, as in real batches."""
        config = read_config(folder)
        return example_texts(self.input_names, config, self.positions(config), batch)

    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """Leave open the number of texts and their length."""
        return tuple({0: "batch", 1: "sequence"} for _ in self.input_names)


def example_texts(
    names: Sequence[str], config: dict[str, Any], positions: int, batch: int
) -> tuple[Tensor, ...]:
    """Return random token ids, a mask and zeros as segments, int64 ``[batch, T]``, as ``names``.

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
        # Some configs say -1 for none.
        padding = config.get("pad_token_id") or 0
        ids[mask == 0] = int(padding) if padding in range(int(config["vocab_size"])) else 0
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return tuple(inputs[name] for name in names)


@lru_cache(maxsize=4)
def _tokenizer(
    folder: Path, files: tuple[str, ...], vocabulary: int, positions: int, *, pads_with_end: bool
) -> SharedTokenizer:
    tokenizer = open_tokenizer(folder, files, vocabulary, "texts need")
    if tokenizer.pad_token_id is None and pads_with_end and tokenizer.eos_token_id is not None:
        log.info("%s: no padding token, so %s pads, masked", folder, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise RecipeError(f"{folder}: the tokenizer has no padding token")
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    # Positions count from the left, and the first token is read there.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return SharedTokenizer(tokenizer)
