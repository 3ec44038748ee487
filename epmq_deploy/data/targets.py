"""What a head should predict for a task's samples: a class, a set of labels, or a value."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from epmq_deploy.data.class_labels import HeadClasses, match_classes
from epmq_deploy.data.samples import EmbeddingSamples, Samples, batches
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.inputs import ModelInputs
from epmq_deploy.models.problem_types import (
    EMBEDDING,
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    TOKEN,
)
from epmq_deploy.models.token_batch import words_read

# As many times the share of equally frequent classes are uneven.
_UNEVEN = 1.5
# How transformers marks words, or tokens, that have no label.
IGNORED = -100
# Samples tokenized at a time.
_BATCH = 64


@dataclass(frozen=True)
class Targets:
    """What a head should predict.

    Attributes:
        values: class numbers int64 ``[n]``, labels int64 ``[n, C]`` of 0 and 1, or values float64
            ``[n]``, by the head's problem type; of words, an int64 array for each sample, ``[n]``,
            with ``IGNORED`` for words without a label.
        assumption: what was assumed because names are missing; empty where nothing was.
    """

    values: npt.NDArray[Any]
    assumption: str = ""


def targets_of(samples: Samples, head: HeadClasses) -> Targets:
    """Return what a task's head should predict for its samples.

    Raises:
        RecipeError: the data have no labels, or they are none of this head.
    """
    if head.problem_type == MULTI_LABEL:
        return _label_sets(samples, head)
    if samples.source.label_columns is not None:
        raise RecipeError(
            f"task {samples.task!r}: label_columns is for multi_label_classification, and the head "
            f"is for {head.problem_type}; give label_column, or head.problem_type"
        )
    if head.problem_type == REGRESSION:
        return Targets(np.array(samples.values("a regression head"), dtype=np.float64))
    if isinstance(samples, EmbeddingSamples):
        return Targets(np.array(samples.relevance(), dtype=np.float64))
    if head.problem_type == TOKEN:
        return _word_labels(samples, head)
    labels = samples.labels(head)
    return Targets(np.array(labels.numbers, dtype=np.int64), labels.assumption)


def label_tensor(samples: Samples, head: HeadClasses, family: ModelInputs, folder: Path) -> Tensor:
    """Return what a task's head should predict, one entry for each of its predictions.

    Args:
        samples: of the task.
        head: the classes to predict.
        family: preprocesses.
        folder: a model folder with preprocessor settings.

    Raises:
        RecipeError: the data have no labels, or they are none of this head.
    """
    if head.problem_type == EMBEDDING:
        raise RecipeError(f"task {samples.task!r} embeds texts, and no label says what is right")
    targets = targets_of(samples, head)
    if head.problem_type != TOKEN:
        return torch.from_numpy(targets.values)
    read = [
        row for inputs in batches(samples, family, folder, _BATCH) for row in words_read(inputs)
    ]
    return torch.from_numpy(of_words_read(targets, read))


def imbalance(targets: Targets, head: HeadClasses) -> str:
    """Say how unevenly classes are represented; empty where they are not, or there are none.

    Args:
        targets: of all samples.
        head: says which classes there are.
    """
    if head.problem_type != SINGLE_LABEL:
        return ""
    classes = head.count or int(targets.values.max()) + 1
    counts = np.bincount(targets.values, minlength=classes)
    largest = int(counts.argmax())
    share = float(counts[largest] / counts.sum())
    if share < max(0.5, _UNEVEN / classes):
        return ""
    name = head.names[largest] if head.names else str(largest)
    return (
        f"{100 * share:.0f}% of the samples are of class {name}, so that always answering it gives "
        "this accuracy; a metric like macro_f1 or matthews_correlation tells more"
    )


def _label_sets(samples: Samples, head: HeadClasses) -> Targets:
    """Return the labels of a head for any number of labels, ``[n, C]``."""
    where = f"task {samples.task!r}: {samples.source.path}"
    columns = samples.source.label_columns
    if columns is not None:
        table = [
            [_flag(value, row, f"{where}: column {column!r}") for value, row in column_values]
            for column in columns
            for column_values in [zip(samples.label_values(column), samples.indices, strict=True)]
        ]
        flags = np.array(table, dtype=np.int64).T
        places, assumption = match_classes(columns, head, where)
        labels = np.zeros((len(flags), head.count or len(columns)), dtype=np.int64)
        labels[:, places] = flags
        return Targets(labels, assumption)
    where = f"{where}: column {samples.source.label_column!r}"
    sets = samples.label_values()
    for entries, row in zip(sets, samples.indices, strict=True):
        if not isinstance(entries, list):
            raise RecipeError(
                f"{where} must hold a list of labels in every row, row {row} holds {entries!r}; "
                "labels in several columns of 0 and 1 are named by label_columns"
            )
    count = head.count or 0
    if _are_flags(sets, count):
        rows = [
            [_flag(value, row, where) for value in entries]
            for entries, row in zip(sets, samples.indices, strict=True)
        ]
        return Targets(np.array(rows, dtype=np.int64))
    flat = [value for entries in sets for value in entries]
    owners = [number for number, entries in enumerate(sets) for _ in entries]
    found = samples.as_classes(flat, [samples.indices[owner] for owner in owners], head)
    labels = np.zeros((len(sets), max([count, *(n + 1 for n in found.numbers)])), dtype=np.int64)
    labels[owners, found.numbers] = 1
    return Targets(labels, found.assumption)


def _word_labels(samples: Samples, head: HeadClasses) -> Targets:
    """Return the class of every word, ``[n]`` arrays; words labelled ``IGNORED`` have none."""
    where = f"task {samples.task!r}: {samples.source.path}"
    column = samples.source.label_column
    lists = samples.label_values()
    sizes = [len(sample.words) for sample in samples.inputs(0, len(samples))]
    for labels, size, row in zip(lists, sizes, samples.indices, strict=True):
        if not isinstance(labels, list) or len(labels) != size:
            held = f"{len(labels)} labels" if isinstance(labels, list) else repr(labels)
            raise RecipeError(
                f"{where}: column {column!r} must hold a label for each word, row {row} holds "
                f"{held} for {size} words"
            )
    flat = [label for labels in lists for label in labels]
    rows = np.repeat(samples.indices, sizes).tolist()
    labelled = [index for index, label in enumerate(flat) if label != IGNORED]
    if not labelled:
        raise RecipeError(f"{where}: column {column!r} labels no word, all are {IGNORED}")
    known = samples.as_classes(
        [flat[index] for index in labelled], [rows[index] for index in labelled], head
    )
    numbers = np.full(len(flat), IGNORED, dtype=np.int64)
    numbers[labelled] = known.numbers
    values = np.empty(len(sizes), dtype=object)
    ends = np.cumsum(sizes)
    for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        values[number] = numbers[end - size : end]
    return Targets(values, known.assumption)


def of_words_read(targets: Targets, numbers: Iterable[Tensor]) -> npt.NDArray[np.int64]:
    """Return the classes of the words that models read, ``[m]``, in the order they predict them.

    Words without a label are among them, as ``IGNORED``.

    Args:
        targets: of a task that labels words.
        numbers: of each sample's words that are read.
    """
    return np.concatenate(
        [labels[read.cpu().numpy()] for labels, read in zip(targets.values, numbers, strict=True)]
    )


def _are_flags(sets: Sequence[Sequence[Any]], count: int) -> bool:
    """Whether every list holds 0 or 1 for each label, rather than the labels that apply."""
    return all(
        len(entries) == count and all(not isinstance(v, str) and v in (0, 1) for v in entries)
        for entries in sets
    )


def _flag(value: Any, row: int, where: str) -> int:
    if isinstance(value, str) or value not in (0, 1):
        raise RecipeError(f"{where} must hold 0 or 1, row {row} holds {value!r}")
    return int(value)
