"""How the samples of a task become the inputs of a model."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor


class ModelInputs(ABC):
    """What a family's models take, and how samples are made into it.

    Attributes:
        modality: of the samples.
        input_names: of the model's inputs, in the order they are passed.
    """

    modality: Literal["image", "text"]
    input_names: tuple[str, ...]

    @abstractmethod
    def collate(self, folder: Path, samples: Sequence[Any]) -> tuple[Tensor, ...]:
        """Turn raw samples (images, texts) into a batch of model inputs, as ``input_names``.

        Args:
            folder: a model folder with preprocessor settings or a tokenizer.
            samples: of one batch.
        """

    @abstractmethod
    def example_inputs(self, folder: Path, batch: int) -> tuple[Tensor, ...]:
        """Return inputs of the right shapes for tracing, as ``input_names``."""

    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """Return the axes that exported graphs leave open, with names, as ``input_names``."""
        return tuple({0: "batch"} for _ in self.input_names)
