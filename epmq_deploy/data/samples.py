"""Loading a task's samples with ``datasets``."""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.artifacts.manifest import fingerprint
from epmq_deploy.checkpoints.hub import hub_id
from epmq_deploy.data.prompts import Wording
from epmq_deploy.errors import EpmqError, NumericsError, RecipeError
from epmq_deploy.hashing import file_sha256, files_sha256
from epmq_deploy.models import ModelFamily
from epmq_deploy.models.text_generation.base import TextPair, generates_text
from epmq_deploy.recipe import DataSource, Task
from epmq_deploy.recipe.prompt import Prompt

log = logging.getLogger(__name__)

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass(frozen=True)
class Samples:
    """Chosen samples of one task, decoded when asked for.

    Attributes:
        task: name used in messages.
        rows: a ``datasets.Dataset``.
        indices: rows chosen, in order.
        source: where they came from.
        column: of the raw inputs.
    """

    task: str
    rows: Any
    indices: Sequence[int]
    source: DataSource
    column: str

    def __len__(self) -> int:
        """Number of samples chosen."""
        return len(self.indices)

    def inputs(self, start: int, stop: int) -> list[Any]:
        """Raw inputs (images, texts) of samples ``start`` to ``stop``.

        Raises:
            RecipeError: one cannot be decoded; names task and row.
        """
        chosen = list(self.indices[start:stop])
        try:
            return list(self.rows.select(chosen)[self.column])
        except Exception:
            # Decoders raise anything; find the row to name.
            for row in chosen:
                self._decode(row)
            raise

    def _decode(self, row: int) -> None:
        try:
            self.rows[row][self.column]
        except Exception as error:
            raise RecipeError(
                f"task {self.task!r}: row {row} of {self.source.path} cannot be decoded "
                f"({_first_line(error)})"
            ) from error

    @property
    def class_names(self) -> list[str] | None:
        """Names the data gives its labels, where it does."""
        feature = self.rows.features.get(self.source.label_column)
        return list(feature.names) if hasattr(feature, "names") else None

    def labels(self, classes: int | None = None) -> Tensor:
        """int64 ``[n]``; booleans are the classes 0 and 1.

        Args:
            classes: how many the head has; None where that is not known.

        Raises:
            RecipeError: no such column, or values that are no integers or no class of the head.
        """
        where, column = f"task {self.task!r}: {self.source.path}", self.source.label_column
        if column is None:
            raise RecipeError(f"{where}: labels are needed, but label_column is not set")
        if column not in self.rows.column_names:
            raise RecipeError(
                f"{where} has no column {column!r}; it has {', '.join(self.rows.column_names)}"
            )
        values = list(self.rows.select(list(self.indices)).select_columns([column])[column])
        for row, value in zip(self.indices, values, strict=True):
            if not isinstance(value, int):
                raise RecipeError(
                    f"{where}: column {column!r} must hold integers (the class's place in "
                    f"head.classes), row {row} holds {value!r}"
                )
        low, high = min(values), max(values)
        if low < 0 or (classes is not None and high >= classes):
            raise RecipeError(
                f"{where} has labels {low:d} to {high:d}, but its head has {classes} classes"
            )
        return torch.tensor(values, dtype=torch.int64)


@dataclass(frozen=True)
class TextSamples(Samples):
    """Samples of a task that is answered in words.

    Attributes:
        wording: makes texts of rows.
        written: answers by row, where the data have none.
    """

    wording: Wording
    written: Mapping[int, str] | None = None

    @property
    def lacks_answers(self) -> bool:
        """Whether there are no answers yet."""
        return self.wording.label_column is None and self.written is None

    def texts(self, start: int, stop: int) -> list[str]:
        """What is read, of samples ``start`` to ``stop``."""
        return [self.wording.text(row) for row in self.rows.select(self.indices[start:stop])]

    def inputs(self, start: int, stop: int) -> list[Any]:
        """What is read and what is to be written, of samples ``start`` to ``stop``."""
        chosen = self.indices[start:stop]
        if self.written is not None:
            answers = [self.written[row] for row in chosen]
        else:
            answers = [self.wording.answer(row) for row in self.rows.select(chosen)]
        return [TextPair(*pair) for pair in zip(self.texts(start, stop), answers, strict=True)]


def load_samples(
    task: str,
    source: DataSource,
    family: ModelFamily,
    *,
    prompt: Prompt | None = None,
    limit: int | None = None,
    seed: int = 0,
    labelled: bool = True,
) -> Samples:
    """Load a data source and choose samples.

    Args:
        task: name used in messages.
        source: what to load.
        family: says whether inputs are images or texts, or texts and what to answer.
        prompt: the task in words, where the family writes texts.
        limit: take at most this many, chosen at random; all in order when absent.
        seed: of that choice.
        labelled: whether tasks in words must come with answers; see ``Wording.of``.

    Raises:
        RecipeError: the data cannot be loaded, holds nothing or lacks a column.
    """
    rows = _load_rows(task, source)
    where, column = f"task {task!r}: {source.path}", source.input_column or family.modality
    if len(rows) == 0:
        raise RecipeError(f"{where} holds no samples")
    indices = list(range(len(rows)))
    if limit is not None:
        random.Random(seed).shuffle(indices)
    chosen = indices[:limit]
    if generates_text(family):
        wording = Wording.of(
            prompt, column, source.label_column, rows.column_names, where, labelled=labelled
        )
        for name in wording.columns:
            _check_texts(rows, name, where)
        if (labels := wording.label_column) is not None:
            wording.check_labels(list(rows.select_columns([labels])[labels]), where)
        return TextSamples(task, rows, chosen, source, column, wording)
    if prompt is not None:
        raise RecipeError(f"{where}: prompt is for models that write texts, not for classifiers")
    if column not in rows.column_names:
        raise RecipeError(
            f"{where} has no column {column!r}; it has {', '.join(rows.column_names)}"
        )
    if family.modality == "image":
        rows = _with_images(rows, column, source, where)
    else:
        _check_texts(rows, column, where)
    return Samples(task, rows, chosen, source, column)


def load_calibration(
    tasks: Mapping[str, Task],
    family: ModelFamily,
    folder: Path,
    *,
    limit: int,
    seed: int,
    option: str,
    without: str,
) -> tuple[dict[str, Samples], list[str]]:
    """Calibration samples by task, and one sentence for every task whose data cannot be used.

    One sample of each task is decoded to make sure that the rest can be. Fewer than asked for are
    logged. Samples of tasks in words may lack answers; see ``tasks.own_answers``.

    Args:
        tasks: the recipe's tasks.
        family: the model's family.
        folder: a model folder with preprocessor settings.
        limit: take at most this many per task.
        seed: of their choice.
        option: that asks for so many, for messages (``merge.samples``).
        without: ends the sentence on a task without data; ``{task}`` is its name.
    """
    samples, problems = {}, []
    for name, task in tasks.items():
        source = task.calibration
        if source is None:
            end = without.format(task=name)
            problems.append(f"task {name!r} has no calibration data{end}")
            continue
        try:
            chosen = load_samples(
                name, source, family, prompt=task.prompt, limit=limit, seed=seed, labelled=False
            )
            if isinstance(chosen, TextSamples) and chosen.lacks_answers:
                family.collate(folder, [TextPair(text, "") for text in chosen.texts(0, 1)])
            else:
                next(batches(chosen, family, folder, 1))
        except EpmqError as error:
            problems.append(str(error))
            continue
        if len(chosen) < limit:
            log.warning(
                "task %r: %d calibration samples, %d were asked for (%s)",
                name,
                len(chosen),
                limit,
                option,
            )
        samples[name] = chosen
    return samples, problems


def batches(
    samples: Samples, family: ModelFamily, folder: Path, batch_size: int
) -> Iterator[tuple[Tensor, ...]]:
    """Model inputs, batch by batch.

    Raises:
        NumericsError: a sample gives NaN or infinite inputs; names task and row.
    """
    for start in range(0, len(samples), batch_size):
        stop = min(start + batch_size, len(samples))
        inputs = family.collate(folder, samples.inputs(start, stop))
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


def missing_data(tasks: Mapping[str, Task]) -> list[str]:
    """One sentence for every local data source that is not there."""
    return [
        f"task {name!r}: {source.path}: no such file or folder"
        for name, task in tasks.items()
        for source in (task.calibration, task.evaluation)
        if source is not None and not Path(source.path).exists() and hub_id(source.path) is None
    ]


def data_sha256(source: DataSource, prompt: Prompt | None = None) -> str:
    """Identifies a data source: its options, and its files' contents where it is local.

    With ``prompt``, the texts made of it.
    """
    path = Path(source.path)
    if path.is_file():
        content = file_sha256(path)
    elif path.is_dir():
        content = files_sha256(path, (file for file in path.rglob("*") if file.is_file()))
    else:
        content = source.path
    options = source.model_dump(exclude={"path"})
    if prompt is not None:
        options["prompt"] = prompt.model_dump(mode="json")
    return fingerprint("data", options, {"content": content})


def _with_images(rows: Any, column: str, source: DataSource, where: str) -> Any:
    """Make the input column decode to images: stored images, encoded bytes or file paths."""
    from datasets import Image

    feature = rows.features[column]
    if isinstance(feature, Image):
        return rows
    kind = getattr(feature, "dtype", None)
    if kind in ("string", "large_string"):
        # Relative paths are taken from the file that lists them.
        folder = Path(source.path).parent
        rows = rows.map(lambda row: {column: str(folder / row[column])})
    elif kind not in ("binary", "large_binary", "dict"):
        raise RecipeError(
            f"{where}: column {column!r} holds {feature}, expected images, encoded bytes or paths"
        )
    return rows.cast_column(column, Image())


def _check_texts(rows: Any, column: str, where: str) -> None:
    """Make sure that the input column holds a text in every row."""
    feature = rows.features[column]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise RecipeError(f"{where}: column {column!r} holds {feature}, expected texts")
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    if values.null_count:
        row = values.is_null().index(True).as_py()
        raise RecipeError(f"{where}: row {row} holds no text in column {column!r}")


def _load_rows(task: str, source: DataSource) -> Any:
    import datasets

    path = Path(source.path)
    where = f"task {task!r}: {source.path}"
    on_hub = None if path.exists() else hub_id(source.path)
    if not path.exists() and on_hub is None:
        raise RecipeError(f"{where}: no such file or folder")
    datasets.disable_progress_bars()
    try:
        if path.is_file():
            builder = _BUILDERS.get(path.suffix)
            if builder is None:
                raise RecipeError(f"{where}: unknown kind of file; known: {', '.join(_BUILDERS)}")
            loaded = datasets.load_dataset(builder, data_files=str(path))
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif on_hub is not None:
            loaded = datasets.load_dataset(
                on_hub.repository, source.subset, revision=on_hub.revision
            )
        else:
            loaded = datasets.load_dataset(source.path, source.subset)
    except RecipeError:
        raise
    except Exception as error:  # datasets raises a different type for every loader
        raise RecipeError(f"{where} cannot be loaded ({_first_line(error)})") from error
    if not isinstance(loaded, dict):
        if source.split is not None:
            raise RecipeError(f"{where} has no splits, but split {source.split!r} was asked for")
        return loaded
    split = source.split or (next(iter(loaded)) if len(loaded) == 1 else None)
    if split not in loaded:
        raise RecipeError(
            f"{where}: split {split!r} not found, name one of {', '.join(loaded)} as split"
        )
    return loaded[split]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
