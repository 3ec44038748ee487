"""An exported classifier in an application."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from epmq_deploy.models import ModelFamily
from epmq_deploy.models.images import read_rgb, to_rgb
from epmq_deploy.models.pooling import EmbeddingSettings
from epmq_deploy.models.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TOKEN
from epmq_deploy.models.text_inputs import TextInputs
from epmq_deploy.models.token_batch import TextToEmbed
from epmq_deploy.recipe import ProblemType
from epmq_deploy.runtime.inference.base import ExportedModel, text_of
from epmq_deploy.runtime.inference.words import LabelledText, labelled_text
from epmq_deploy.runtime.ort.sessions import Graph


def is_answer(output: str) -> bool:
    """Whether an output of a graph is what a task answers."""
    return output.startswith(("logits_", "embedding_"))


@dataclass(frozen=True)
class Prediction:
    """A classifier's prediction for one input and one task.

    Attributes:
        label: name of the most likely class; its number as text where neither recipe nor expert
            names it.
        score: its probability.
        scores: probabilities of all classes, float32 ``[C]``.
        labels: their names.
    """

    label: str
    score: float
    scores: npt.NDArray[np.float32]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class LabelSet:
    """The labels that a model gives one input for a task with any number of them.

    Attributes:
        labels: names of those with a probability above 1/2.
        scores: probabilities of all, float32 ``[C]``.
        names: of all.
    """

    labels: tuple[str, ...]
    scores: npt.NDArray[np.float32]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Value:
    """The value that a regression head gives one input."""

    value: float


@dataclass(frozen=True)
class Embedding:
    """The embedding of a text, float32 ``[E]``."""

    vector: npt.NDArray[np.float32]


HeadOutput = Prediction | LabelSet | Value | LabelledText | Embedding


class ExportedClassifier(ExportedModel[HeadOutput]):
    """One graph of an export with its preprocessing.

    Args:
        graph: the graph.
        family: of the model.
        folder: of the export.
        inputs: by task, the folder whose settings make its inputs where it is not ``folder``.
        classes: names of each task's classes, where they are known.
        problem_types: of tasks that do not choose one of several classes.
        pairs: the two columns of each task that reads pairs of texts.
        embeddings: of tasks that embed texts, how.
        batch_size: inputs per run.
    """

    def __init__(
        self,
        graph: Graph,
        family: ModelFamily,
        folder: Path,
        inputs: Mapping[str, Path],
        classes: Mapping[str, Sequence[str] | None],
        problem_types: Mapping[str, ProblemType],
        pairs: Mapping[str, tuple[str, str]],
        embeddings: Mapping[str, EmbeddingSettings],
        batch_size: int,
    ) -> None:
        self._outputs = {
            name.partition("_")[2]: name for name in graph.output_names if is_answer(name)
        }
        tasks = list(self._outputs)
        super().__init__(tasks, graph.provider, batch_size)
        self._graph, self._family = graph, family
        self._folders = {name: inputs.get(name, folder) for name in tasks}
        self._names = {name: classes.get(name) for name in tasks}
        self._pairs, self._problem_types = pairs, problem_types
        self._embeddings = embeddings

    def _holds_several(self, inputs: Any) -> bool:
        pair = isinstance(inputs, tuple) and len(inputs) == 2 and bool(self._pairs)
        return not pair and super()._holds_several(inputs)

    def _sample(self, item: Any, tasks: Sequence[str]) -> Any:
        if self._family.modality == "image":
            return _image(item)
        single = [name for name in tasks if name not in self._pairs]
        if not single:
            return _pair(item, {name: self._pairs[name] for name in tasks})
        if len(single) < len(tasks):
            raise ValueError(
                f"{' and '.join(single)} read one text, other tasks pairs of texts; name the tasks "
                "to answer"
            )
        return text_of(item)

    def _answers(self, samples: Sequence[Any], tasks: Sequence[str]) -> list[dict[str, HeadOutput]]:
        labelling = [name for name in tasks if self._problem_types.get(name) == TOKEN]
        embedding = [name for name in tasks if name in self._embeddings]
        others = [name for name in tasks if name not in (*labelling, *embedding)]
        answers: dict[str, Sequence[HeadOutput]] = {}
        for folder, names in self._by_folder(others).items():
            logits = self._run(self._family.collate(folder, samples), names)
            answers |= {name: [self._predict(name, row) for row in logits[name]] for name in names}
        for name in embedding:
            texts = [TextToEmbed(text, self._embeddings[name]) for text in samples]
            vectors = self._run(self._family.collate(self._folders[name], texts), [name])[name]
            answers[name] = [Embedding(vector) for vector in vectors]
        for folder, names in self._by_folder(labelling).items():
            answers |= self._label_words(folder, samples, names)
        return [{name: answers[name][row] for name in tasks} for row in range(len(samples))]

    def _by_folder(self, tasks: Sequence[str]) -> dict[Path, list[str]]:
        """Return tasks by the folder whose settings make their inputs."""
        return {
            folder: [name for name in tasks if self._folders[name] == folder]
            for folder in dict.fromkeys(self._folders[name] for name in tasks)
        }

    def _run(
        self, batch: tuple[Tensor, ...], tasks: Sequence[str]
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return the logits or embeddings of some tasks."""
        if self._graph.tasks:
            # The backbone itself differs from task to task.
            return {
                name: self._graph.run(batch, [self._outputs[name]], task=name)[self._outputs[name]]
                for name in tasks
            }
        outputs = self._graph.run(batch, [self._outputs[name] for name in tasks])
        return {name: outputs[self._outputs[name]] for name in tasks}

    def _label_words(
        self, folder: Path, texts: Sequence[str], tasks: Sequence[str]
    ) -> dict[str, Sequence[HeadOutput]]:
        """Return the texts' words with their tags, by task."""
        assert isinstance(self._family, TextInputs), "only texts have words"
        batch, words = self._family.find_words(folder, texts)
        logits = self._run(batch, tasks)
        return {
            name: [
                labelled_text(text, spans, row, self._classes(name, row.shape[-1]))
                for text, spans, row in zip(texts, words, logits[name], strict=True)
            ]
            for name in tasks
        }

    def _classes(self, task: str, count: int) -> tuple[str, ...]:
        """Return the names of a task's classes, or else their numbers."""
        return tuple(self._names[task] or map(str, range(count)))

    def _predict(self, task: str, logits: npt.NDArray[np.float32]) -> Prediction | LabelSet | Value:
        kind = self._problem_types.get(task, SINGLE_LABEL)
        if kind == REGRESSION:
            return Value(float(logits[0]))
        names = self._classes(task, len(logits))
        exact = logits.astype(np.float64)
        if kind == MULTI_LABEL:
            scores = 1 / (1 + np.exp(-exact))
            chosen = tuple(name for name, logit in zip(names, logits, strict=True) if logit > 0)
            return LabelSet(chosen, scores.astype(np.float32), names)
        scores = np.exp(exact - exact.max())
        scores /= scores.sum()
        best = int(logits.argmax())
        return Prediction(names[best], float(scores[best]), scores.astype(np.float32), names)


def _pair(item: Any, columns: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """Return an input that is a pair of texts, as a sequence or by column.

    Raises:
        ValueError: it is none, or lacks a column of a task.
    """
    task, names = next(iter(columns.items()))
    if isinstance(item, Mapping):
        for task, names in columns.items():
            if missing := [name for name in names if name not in item]:
                raise ValueError(f"task {task!r} reads {missing[0]}, which is not given")
        pairs = {tuple(text_of(item[name]) for name in names) for names in columns.values()}
        if len(pairs) > 1:
            raise ValueError("the tasks read different columns; ask one task at a time")
        item = pairs.pop()
    if isinstance(item, str) or not isinstance(item, Sequence) or len(item) != 2:
        raise ValueError(f"task {task!r} reads two texts, {names[0]} and {names[1]}; give both")
    return text_of(item[0]), text_of(item[1])


def _image(item: Any) -> Image.Image:
    """Return an image as evaluation reads it: RGB, the way up its camera says.

    Raises:
        ValueError: it is no image, or of a mode whose values have no known range.
        OSError: it cannot be read.
    """
    if isinstance(item, Image.Image):
        return to_rgb(item).image
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim not in (2, 3) or item.shape[2:] not in ((), (3,)):
            raise ValueError(
                f"expected a uint8 array [H, W] or [H, W, 3], found {item.dtype} {item.shape}"
            )
        return Image.fromarray(item)
    if not isinstance(item, str | Path):
        raise ValueError(f"expected an image, a file or an array, found {type(item).__name__}")
    try:
        return read_rgb(item).image
    except ValueError as error:
        raise ValueError(f"{item}: {error}") from error
    except OSError as error:
        raise OSError(f"{item}: {error.strerror or error}") from error
