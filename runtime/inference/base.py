"""What all exported models in applications share: check inputs, run batches, return predictions."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

from epmq_deploy.errors import MismatchError

Result = TypeVar("Result")


class ExportedModel(ABC, Generic[Result]):
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

    def predict(self, item: Any, tasks: Sequence[str] | None = None) -> dict[str, Result]:
        """Return predictions for one input, by task.

        Args:
            item: an image (PIL, a file's path, or a uint8 array ``[H, W]`` or ``[H, W, 3]``), a
                text or, for tasks on pairs of texts, both as a tuple or by column. For a task with
                a prompt, the text takes the place of its only column; give a dictionary of texts by
                column where it has several.
            tasks: names of the tasks to answer; default: all.

        Raises:
            MismatchError: an unknown task, or an input the model cannot take; names every one.
        """
        return self.predict_batch([item], tasks)[0]

    def predict_batch(
        self, items: Iterable[Any], tasks: Sequence[str] | None = None
    ) -> list[dict[str, Result]]:
        """Return predictions for several inputs; see ``predict``."""
        names = self.tasks if tasks is None else tuple(tasks)
        unknown = [name for name in names if name not in self.tasks]
        if unknown:
            known = ", ".join(self.tasks)
            raise MismatchError(
                "tasks", [f"unknown task {name!r}; the model has {known}" for name in unknown]
            )
        samples = self._read(list(items), names)
        results: list[dict[str, Result]] = []
        for start in range(0, len(samples), self._batch_size):
            results += self._answers(samples[start : start + self._batch_size], names)
        return results

    def __call__(self, inputs: Any, tasks: Sequence[str] | None = None) -> Any:
        """Call ``predict`` for one input, ``predict_batch`` for a sequence of them."""
        several = self._holds_several(inputs)
        return self.predict_batch(inputs, tasks) if several else self.predict(inputs, tasks)

    def _holds_several(self, inputs: Any) -> bool:
        """Whether something that was passed is a sequence of inputs rather than one of them."""
        if isinstance(inputs, np.ndarray):
            return inputs.ndim == 4
        single = isinstance(inputs, str | Path | Image.Image | Mapping)
        return isinstance(inputs, Iterable) and not single

    @abstractmethod
    def _sample(self, item: Any, tasks: Sequence[str]) -> Any:
        """Return an input as ``_answers`` takes it.

        Raises:
            ValueError: the model cannot take it.
            OSError: it cannot be read.
        """

    @abstractmethod
    def _answers(self, samples: Sequence[Any], tasks: Sequence[str]) -> list[dict[str, Result]]:
        """Return predictions for a batch of samples, by task."""

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
        ValueError: it is none, or has halves of characters (surrogates) that no tokenizer takes.
    """
    if not isinstance(item, str):
        raise ValueError(f"expected a str, found {type(item).__name__}")
    try:
        item.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not Unicode ({error.reason})") from error
    return item
