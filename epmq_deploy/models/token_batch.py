"""Batches of tasks whose heads read all tokens: to label words, or to embed texts.

A word is labelled at its first token, as experts are fine-tuned (Devlin et al., arXiv 1810.04805,
section 5.3): their heads read the hidden states of these tokens, those of others do not count.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from epmq_deploy.models.pooling import EmbeddingSettings, pooled
from epmq_deploy.models.tokens import TokenWeights


@dataclass(frozen=True)
class Words:
    """A text, split into words as its labels are."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class TextToEmbed:
    """A text, and how it becomes an embedding."""

    text: str
    settings: EmbeddingSettings


class TokenBatch(tuple[Tensor, ...], ABC):
    """Model inputs of texts of which all tokens are read."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""

    @abstractmethod
    def features(self, states: Tensor) -> Tensor:
        """Return what heads take, ``[m, D]``, of all tokens' hidden states ``[B, T, D]``."""

    @abstractmethod
    def counts(self) -> Tensor:
        """Return how many rows of ``features`` each text has, int64 ``[B]``, on the CPU."""


class WordBatch(TokenBatch):
    """Model inputs of texts given as words.

    Attributes:
        words: int64 ``[B, T]``, the number of each word at its first token; -1 at other tokens.
    """

    words: Tensor

    def __new__(cls, inputs: Iterable[Tensor], words: Tensor) -> Self:
        """Return a batch of these inputs."""
        batch = super().__new__(cls, inputs)
        batch.words = words
        return batch

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""
        return type(self)((value.to(device) for value in self), self.words.to(device))

    def features(self, states: Tensor) -> Tensor:
        """Return the states of first tokens, word after word."""
        return states[self.words >= 0]

    def counts(self) -> Tensor:
        """Return the number of words that are read."""
        return (self.words >= 0).sum(dim=1).cpu()


class PooledBatch(TokenBatch):
    """Model inputs of texts to embed.

    Attributes:
        mask: ``[B, T]``, 0 for padding.
        settings: how tokens become an embedding.
    """

    mask: Tensor
    settings: EmbeddingSettings

    def __new__(cls, inputs: Iterable[Tensor], mask: Tensor, settings: EmbeddingSettings) -> Self:
        """Return a batch of these inputs."""
        batch = super().__new__(cls, inputs)
        batch.mask, batch.settings = mask, settings
        return batch

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""
        tensors = (value.to(device) for value in self)
        return type(self)(tensors, self.mask.to(device), self.settings)

    def features(self, states: Tensor) -> Tensor:
        """Return the pooled states, ``[B, D]``."""
        return pooled(states, self.mask, self.settings.pooling)

    def counts(self) -> Tensor:
        """Return 1 for every text."""
        return torch.ones(len(self.mask), dtype=torch.int64)


def on_device(inputs: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Return a batch on a device."""
    if isinstance(inputs, TokenBatch):
        return inputs.to(device)
    return tuple(value.to(device) for value in inputs)


def words_read(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the words of each sample that have a token, by number; others are cut off."""
    return [row[row >= 0] for row in inputs.words] if isinstance(inputs, WordBatch) else []


def tokens_read(tokens: TokenWeights, inputs: tuple[Tensor, ...]) -> TokenWeights:
    """Return which tokens count where a task's head reads all of them.

    Args:
        tokens: what counts where it reads what the family says.
        inputs: of the task.
    """
    return TokenWeights(tokens.real) if isinstance(inputs, TokenBatch) else tokens
