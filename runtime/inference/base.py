"""What every exported model in an application does: check what is asked, batch, answer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from epmq_deploy.errors import MismatchError


class DeployedModel(ABC):
    """The graphs of one format with their preprocessing; see `epmq_deploy.runtime.load`.

    Attributes:
        tasks: their names.
        provider: the execution provider that runs the graphs.

    Args:
        tasks: their names.
        provider: the execution provider that runs the graphs.
        batch_size: inputs per run.
    """

    def __init__(self, tasks: Sequence[str], provider: str, batch_size: int) -> None:
        self.tasks = tuple(tasks)
        self.provider = provider
        self._batch_size = batch_size

    def __call__(self, inputs: Any, tasks: Sequence[str] | None = None) -> Any:
        """Classify, or answer in words.

        Args:
            inputs: one input or a sequence of them. Images are PIL images, files (path or text) or
                uint8 arrays ``[H, W]`` or ``[H, W, 3]``; texts are texts. Where a task is put into
                words by a prompt, a text takes the place of its only column; texts by column where
                it has several.
            tasks: names of the tasks wanted; all when absent.

        Returns:
            A ``Prediction`` by task (an ``Answer`` of models that write texts), or a list of such
            dictionaries for a sequence of inputs.

        Raises:
            MismatchError: an unknown task, or inputs the model cannot take; names every one.
        """
        wanted = self.tasks if tasks is None else tuple(tasks)
        unknown = [name for name in wanted if name not in self.tasks]
        if unknown:
            known = ", ".join(self.tasks)
            raise MismatchError(
                "tasks", [f"no task {name!r}; there is {known}" for name in unknown]
            )
        several = _is_sequence(inputs)
        samples = self._read(list(inputs) if several else [inputs], wanted)
        found: list[dict[str, Any]] = []
        for start in range(0, len(samples), self._batch_size):
            found += self._answers(samples[start : start + self._batch_size], wanted)
        return found if several else found[0]

    @abstractmethod
    def _sample(self, item: Any, tasks: Sequence[str]) -> Any:
        """Return an input as ``_answers`` takes it.

        Raises:
            ValueError: the model cannot take it.
            OSError: it cannot be read.
        """

    @abstractmethod
    def _answers(self, samples: Sequence[Any], tasks: Sequence[str]) -> list[dict[str, Any]]:
        """Return what the model says of a batch of samples, by task."""

    def _read(self, inputs: Sequence[Any], tasks: Sequence[str]) -> list[Any]:
        samples, problems = [], []
        for index, item in enumerate(inputs):
            try:
                samples.append(self._sample(item, tasks))
            except (ValueError, OSError) as error:
                problems.append(f"input {index}: {error}")
        if problems:
            raise MismatchError("inputs", problems)
        return samples


def text_of(item: Any) -> str:
    """Return an input that is a text.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(item, str):
        raise ValueError(f"expected a text, found {type(item).__name__}")
    return item


def _is_sequence(inputs: Any) -> bool:
    if isinstance(inputs, np.ndarray):
        return inputs.ndim == 4
    single = isinstance(inputs, str | Path | Image.Image | Mapping)
    return isinstance(inputs, Iterable) and not single
