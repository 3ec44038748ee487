"""Augmentation of calibration samples by modality; the expert labels what it is shown.

Few samples are what limits distillation, and no label has to stay right: images are shifted and
mixed as in Beyer et al. (arXiv 2106.05237), words of texts are dropped and texts are joined from
parts of two. Texts with an answer stay as they are: the answer would no longer belong to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from epmq_deploy.models.token_batch import TextToEmbed, Words

# Largest shift of an image and largest change of its size, as shares of its size.
_SHIFT = 0.125
_STRETCH = 0.1
# Share of batches in which each image is mixed with another one of its task.
_MIXED = 0.5
# Share of words dropped, and share of texts joined from parts of two.
_DROPPED = 0.1
_JOINED = 0.3


@dataclass(frozen=True)
class Augmentation:
    """How the samples of one task are changed; nothing is changed by default.

    Attributes:
        modality: ``image`` changes model inputs, ``text`` raw texts; None changes nothing.
    """

    modality: Literal["image", "text"] | None = None

    def of_samples(self, samples: list[Any], generator: torch.Generator) -> list[Any]:
        """Return raw samples of one batch, changed where they are texts."""
        if self.modality != "text":
            return samples
        partners = torch.randperm(len(samples), generator=generator).tolist()
        return [
            _changed(sample, samples[partner], generator)
            for sample, partner in zip(samples, partners, strict=True)
        ]

    def of_inputs(
        self, inputs: tuple[Tensor, ...], generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Return model inputs of one batch, changed where they are images."""
        if self.modality != "image":
            return inputs
        (pixels,) = inputs
        return (mixed(moved(pixels, generator), generator),)


def moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its size and stretch it by a tenth; repeat its edge.

    Args:
        pixels: ``[B, C, H, W]``.
        generator: of random numbers.
    """
    count = len(pixels)
    shift = (torch.rand(count, 2, generator=generator) * 2 - 1) * 2 * _SHIFT
    size, aspect = (1 + (torch.rand(2, count, generator=generator) * 2 - 1) * _STRETCH).unbind()
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = size
    affine[:, 1, 1] = size * aspect
    affine[:, :, 2] = shift
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def mixed(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blend, in half of the batches, each image ``[B, C, H, W]`` with another one of the batch."""
    chosen = float(torch.rand(1, generator=generator)) < _MIXED
    share = torch.rand(len(pixels), 1, 1, 1, generator=generator)
    partners = torch.randperm(len(pixels), generator=generator)
    return pixels.lerp(pixels[partners], share) if chosen else pixels


def _changed(sample: Any, partner: Any, generator: torch.Generator) -> Any:
    """Return a raw text sample with words dropped, perhaps joined with another of its kind."""
    if isinstance(sample, str):
        return " ".join(_words(sample.split(), partner.split(), generator))
    if isinstance(sample, TextToEmbed):
        return replace(sample, text=_changed(sample.text, partner.text, generator))
    if isinstance(sample, Words):
        return Words(tuple(_words(sample.words, partner.words, generator)))
    if isinstance(sample, tuple):
        return tuple(_changed(*texts, generator) for texts in zip(sample, partner, strict=True))
    return sample


def _words(words: Sequence[str], others: Sequence[str], generator: torch.Generator) -> list[str]:
    """Return some of the words; at times those after a point from another text. Never none."""
    joined, point, *rest = torch.rand(
        2 + max(len(words), len(others)), generator=generator
    ).tolist()
    if joined < _JOINED:
        words = [*words[: int(point * len(words))], *others[int(point * len(others)) :]]
    remaining = [word for word, number in zip(words, rest, strict=False) if number >= _DROPPED]
    return remaining or list(words[:1])
