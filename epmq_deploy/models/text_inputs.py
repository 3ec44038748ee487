"""How texts become token ids and masks."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
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
from epmq_deploy.models.token_batch import PooledBatch, TextToEmbed, WordBatch, Words
from epmq_deploy.models.tokenizer import open_tokenizer

log = logging.getLogger(__name__)

_EXAMPLE_TOKENS = 8


@dataclass(frozen=True)
class WordSpan:
    """A word that the tokenizer finds in a text.

    Attributes:
        token: number of its first token.
        start: its first character.
        stop: the character after its last.
    """

    token: int
    start: int
    stop: int


class TextInputs(ModelInputs):
    """Texts, pairs of texts, or texts as words, right-padded.

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
            samples: texts, pairs of texts, ``Words`` or ``TextToEmbed``; all of one kind.

        Raises:
            RecipeError: the tokenizer is missing or does not fit the model.
        """
        if isinstance(samples[0], Words):
            return self._collate_words(folder, samples)
        if isinstance(samples[0], TextToEmbed):
            return self._collate_to_embed(folder, samples)
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
        return self._tensors(batch)

    def _collate_words(self, folder: Path, samples: Sequence[Words]) -> WordBatch:
        """Turn texts that are split into words into a batch."""
        batch = self._encode_words(folder, [list(sample.words) for sample in samples], split=True)
        inputs = self._tensors(batch)
        words = torch.full_like(inputs[0], -1)
        for row in range(len(samples)):
            for token, number in _first_tokens(batch.word_ids(row)):
                words[row, token] = number
        return WordBatch(inputs, words)

    def _collate_to_embed(self, folder: Path, samples: Sequence[TextToEmbed]) -> PooledBatch:
        """Turn texts into a batch, cut where the expert cuts them."""
        settings, tokenizer = samples[0].settings, self.tokenizer(folder)
        longest = min(settings.longest or tokenizer.model_max_length, tokenizer.model_max_length)
        batch = tokenizer(
            [sample.text for sample in samples],
            padding=True,
            truncation=True,
            max_length=longest,
            return_token_type_ids="token_type_ids" in self.input_names,
            return_tensors="pt",
        )
        return PooledBatch(self._tensors(batch), batch["attention_mask"], settings)

    def find_words(
        self, folder: Path, texts: Sequence[str]
    ) -> tuple[tuple[Tensor, ...], list[list[WordSpan]]]:
        """Turn texts into a batch, and find the words in them, as far as the encoder reads them.

        Args:
            folder: a model folder with a tokenizer.
            texts: not split.

        Returns:
            Model inputs as ``input_names``, and each text's words.
        """
        batch = self._encode_words(folder, list(texts), split=False)
        spans = [
            [
                WordSpan(token, *batch.word_to_chars(row, number))
                for token, number in _first_tokens(batch.word_ids(row))
            ]
            for row in range(len(texts))
        ]
        return self._tensors(batch), spans

    def _encode_words(self, folder: Path, texts: Sequence[Any], *, split: bool) -> Any:
        return self.tokenizer(folder, words=True)(
            texts,
            is_split_into_words=split,
            padding=True,
            truncation=True,
            return_token_type_ids="token_type_ids" in self.input_names,
            return_tensors="pt",
        )

    def _tensors(self, batch: Any) -> tuple[Tensor, ...]:
        return tuple(batch[name].to(torch.int64) for name in self.input_names)

    @uses_settings
    def tokenizer(self, folder: Path, *, words: bool = False) -> Any:
        """Return the folder's tokenizer, which cuts texts at the length the encoder takes.

        Args:
            folder: a model folder with a tokenizer.
            words: whether it has to say which token belongs to which word.

        Raises:
            RecipeError: it is missing, does not fit the model, or knows nothing of words.
        """
        config = read_config(folder)
        return _tokenizer(
            folder,
            self.tokenizer_files,
            self.vocabulary(config),
            self.positions(config),
            pads_with_end=self.pads_with_end,
            words=words,
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


def _first_tokens(numbers: Sequence[int | None]) -> list[tuple[int, int]]:
    """Return the first token of each word, and the word's number.

    Args:
        numbers: of the word that each token belongs to; None for special tokens and padding.
    """
    previous = (None, *numbers[:-1])
    return [
        (token, number)
        for token, (number, before) in enumerate(zip(numbers, previous, strict=True))
        if number is not None and number != before
    ]


@lru_cache(maxsize=4)
def _tokenizer(
    folder: Path,
    files: tuple[str, ...],
    vocabulary: int,
    positions: int,
    *,
    pads_with_end: bool,
    words: bool,
) -> SharedTokenizer:
    tokenizer = open_tokenizer(folder, files, vocabulary, "texts need")
    if words and not tokenizer.is_fast:
        raise RecipeError(
            f"{folder}: the tokenizer does not say which token belongs to which word, which "
            "labelling words needs; save it as tokenizer.json"
        )
    if words and getattr(tokenizer, "add_prefix_space", None) is False:
        # Words within a text begin with the space before them; so they have to where they are
        # given one by one, as in transformers' examples.
        tokenizer = open_tokenizer(folder, files, vocabulary, "texts need", add_prefix_space=True)
    if tokenizer.pad_token_id is None and pads_with_end and tokenizer.eos_token_id is not None:
        log.info("%s: no padding token, so %s pads, masked", folder, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise RecipeError(f"{folder}: the tokenizer has no padding token")
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    # Positions count from the left, and the first token is read there.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return SharedTokenizer(tokenizer)
