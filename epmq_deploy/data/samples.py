"""The samples of a task, decoded when asked for, and batches of model inputs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.data.class_labels import ClassLabels, HeadClasses, class_labels
from epmq_deploy.data.prompts import PromptFormat
from epmq_deploy.errors import NumericsError, RecipeError
from epmq_deploy.models.inputs import ModelInputs
from epmq_deploy.models.pooling import EmbeddingSettings
from epmq_deploy.models.text_generation.base import TextPair
from epmq_deploy.models.token_batch import TextToEmbed, Words
from epmq_deploy.recipe import SAME_AS_HEAD, DataSource


@dataclass(frozen=True)
class Samples:
    """Chosen samples of one task.

    Attributes:
        task: name used in messages.
        rows: a ``datasets.Dataset``.
        indices: rows chosen, in order.
        source: where they came from.
        columns: of the raw inputs; two where the model reads pairs of texts.
        inputs_folder: with the settings that make model inputs of them; None for the model's own.
    """

    task: str
    rows: Any
    indices: Sequence[int]
    source: DataSource
    columns: tuple[str, ...]
    inputs_folder: Path | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.indices)

    def inputs(self, start: int, stop: int) -> list[Any]:
        """Return the texts, or pairs of texts, of samples ``start`` to ``stop``."""
        selected = self.rows.select(list(self.indices[start:stop]))
        values = [list(selected[column]) for column in self.columns]
        return values[0] if len(values) == 1 else list(zip(*values, strict=True))

    @property
    def class_names(self) -> Sequence[str] | None:
        """Return the names of the labels ``0, 1, ...``; None where nothing names them."""
        given = self.source.label_names
        if given is not None:
            return None if given == SAME_AS_HEAD else given
        feature = self.rows.features.get(self.source.label_column)
        # Of a column of lists, what the lists hold.
        feature = getattr(feature, "feature", feature)
        return list(feature.names) if hasattr(feature, "names") else None

    def label_values(self, column: str | None = None) -> list[Any]:
        """Return what a label column holds, as stored.

        Args:
            column: name; the data source's ``label_column`` where it is None.

        Raises:
            RecipeError: no such column.
        """
        where, column = (
            f"task {self.task!r}: {self.source.path}",
            column or self.source.label_column,
        )
        if column is None:
            raise RecipeError(f"{where}: labels are needed, but label_column is not set")
        if column not in self.rows.column_names:
            raise RecipeError(
                f"{where} has no column {column!r}; it has {', '.join(self.rows.column_names)}"
            )
        return list(self.rows.select(list(self.indices)).select_columns([column])[column])

    def values(self, purpose: str) -> list[float]:
        """Return the labels as numbers.

        Args:
            purpose: what they are, for messages.

        Raises:
            RecipeError: no such column, or it holds something else.
        """
        where = f"task {self.task!r}: {self.source.path}: column {self.source.label_column!r}"
        stored = self.label_values()
        for value, row in zip(stored, self.indices, strict=True):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise RecipeError(
                    f"{where} must hold numbers for {purpose}, row {row} holds {value!r}"
                )
        return [float(value) for value in stored]

    def labels(self, head: HeadClasses | None = None) -> ClassLabels:
        """Return the labels as class numbers of a head.

        Args:
            head: the classes to translate to; the data's own numbers where it is None.

        Raises:
            RecipeError: no such column, or labels that are no classes of the head.
        """
        return self.as_classes(self.label_values(), self.indices, head or HeadClasses())

    def as_classes(
        self, values: Sequence[Any], rows: Sequence[int], head: HeadClasses
    ) -> ClassLabels:
        """Return values of the label column as class numbers of a head.

        Args:
            values: class numbers or names.
            rows: where each value stands, for messages.
            head: the classes to translate to.

        Raises:
            RecipeError: a value is no class of the head.
        """
        where = f"task {self.task!r}: {self.source.path}: column {self.source.label_column!r}"
        labels = class_labels(values, rows, self.class_names, head, where)
        # What the recipe says is not assumed.
        return labels if self.source.label_names is None else ClassLabels(labels.numbers)


@dataclass(frozen=True)
class WordSamples(Samples):
    """Samples of a task that labels words: lists of words, and of their labels."""

    def inputs(self, start: int, stop: int) -> list[Any]:
        """Return the ``Words`` of samples ``start`` to ``stop``."""
        return [Words(tuple(words)) for words in super().inputs(start, stop)]


@dataclass(frozen=True)
class EmbeddingSamples(Samples):
    """Samples of a task that embeds texts: single texts, or pairs that are compared.

    Attributes:
        settings: how texts are embedded.
    """

    settings: EmbeddingSettings

    def inputs(self, start: int, stop: int) -> list[Any]:
        """Return the texts of samples ``start`` to ``stop``; of a pair, one after the other."""
        rows = super().inputs(start, stop)
        texts = [text for pair in rows for text in pair] if len(self.columns) > 1 else rows
        return [TextToEmbed(text, self.settings) for text in texts]

    def pairs(self) -> list[tuple[str, str]]:
        """Return all pairs of texts."""
        return super().inputs(0, len(self))

    def relevance(self) -> list[float]:
        """Return how similar, or how relevant, the texts of each pair are to each other.

        1 for every pair where the data are said to have no such column.

        Raises:
            RecipeError: the column is missing or holds something else than numbers.
        """
        if self.source.label_column is None:
            return [1.0] * len(self)
        return self.values("similarities")


@dataclass(frozen=True)
class TextSamples(Samples):
    """Samples of a text-generation task.

    Attributes:
        prompt_format: turns rows into texts and answers.
        pseudo_labels: answers by row, where the data have none.
    """

    prompt_format: PromptFormat
    pseudo_labels: Mapping[int, str] | None = None

    @property
    def lacks_labels(self) -> bool:
        """Whether there are neither answers nor pseudo-labels."""
        return self.prompt_format.label_column is None and self.pseudo_labels is None

    def texts(self, start: int, stop: int) -> list[str]:
        """Return what the model reads, of samples ``start`` to ``stop``."""
        return [self.prompt_format.text(row) for row in self.rows.select(self.indices[start:stop])]

    def inputs(self, start: int, stop: int) -> list[Any]:
        """Return the ``TextPair`` of samples ``start`` to ``stop``."""
        chosen = self.indices[start:stop]
        if self.pseudo_labels is not None:
            answers = [self.pseudo_labels[row] for row in chosen]
        else:
            answers = [self.prompt_format.answer(row) for row in self.rows.select(chosen)]
        return [TextPair(*pair) for pair in zip(self.texts(start, stop), answers, strict=True)]


def batches(
    samples: Samples, family: ModelInputs, folder: Path, batch_size: int
) -> Iterator[tuple[Tensor, ...]]:
    """Yield model inputs, batch by batch.

    Args:
        samples: of one task.
        family: of the model.
        folder: of the model; its settings make the inputs, unless the samples name others.
        batch_size: of all batches but the last.

    Raises:
        NumericsError: a sample gives NaN or infinite inputs; names task and row.
    """
    for start in range(0, len(samples), batch_size):
        stop = min(start + batch_size, len(samples))
        inputs = family.collate(samples.inputs_folder or folder, samples.inputs(start, stop))
        check_finite(samples, start, inputs)
        yield inputs


def check_finite(samples: Samples, start: int, values: Sequence[Tensor]) -> None:
    """Make sure a batch that begins with sample ``start`` is finite.

    Raises:
        NumericsError: names the task and the row of the first sample that is not.
    """
    for value in values:
        if not value.is_floating_point():
            continue
        finite = torch.isfinite(value).flatten(1).all(dim=1)
        if not bool(finite.all()):
            row = samples.indices[start + int((~finite).nonzero()[0])]
            raise NumericsError(
                f"task {samples.task!r}: row {row} of {samples.source.path} gives NaN or "
                "infinite values"
            )
