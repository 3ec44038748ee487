"""Loading a task's samples with ``datasets``."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.checkpoints import looks_like_hub_id
from epmq_deploy.errors import NumericsError, RecipeError
from epmq_deploy.models import ModelFamily
from epmq_deploy.recipe import DataSource
from epmq_deploy.stage import file_sha256, files_sha256, fingerprint

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass(frozen=True)
class Samples:
    """Chosen samples of one task, decoded when asked for.

    Attributes:
        task: name used in messages.
        rows: a ``datasets.Dataset``.
        indices: rows chosen, in order.
        source: where they came from.
    """

    task: str
    rows: Any
    indices: Sequence[int]
    source: DataSource

    def __len__(self) -> int:
        return len(self.indices)

    def inputs(self, start: int, stop: int) -> list[Any]:
        """Raw inputs (images, texts) of samples ``start`` to ``stop``."""
        chosen = self.rows.select(list(self.indices[start:stop]))
        return list(chosen[self.source.input_column])

    def labels(self) -> Tensor:
        """int64 ``[n]``.

        Raises:
            RecipeError: no label column.
        """
        column = self.source.label_column
        if column is None:
            raise RecipeError(
                f"task {self.task!r}: its data has no label_column, but labels are needed"
            )
        return torch.tensor(list(self.rows.select(list(self.indices))[column]), dtype=torch.int64)


def load_samples(
    task: str, source: DataSource, *, limit: int | None = None, seed: int | None = None
) -> Samples:
    """Load a data source and choose samples.

    Args:
        task: name used in messages.
        source: what to load.
        limit: take at most this many.
        seed: choose at random with this seed; the first ones when absent.

    Raises:
        RecipeError: the data cannot be loaded or lacks a column.
    """
    rows = _load_rows(task, source)
    for column in (source.input_column, source.label_column):
        if column is not None and column not in rows.column_names:
            raise RecipeError(
                f"task {task!r}: {source.path} has no column {column!r}; "
                f"it has {', '.join(rows.column_names)}"
            )
    indices = list(range(len(rows)))
    if seed is not None:
        random.Random(seed).shuffle(indices)
    return Samples(task, rows, indices[:limit], source)


def batches(
    samples: Samples, family: ModelFamily, folder: Path, batch_size: int
) -> Iterator[tuple[Tensor, ...]]:
    """Model inputs, batch by batch.

    Raises:
        NumericsError: a sample gives NaN or infinite inputs; names task and sample.
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


def data_sha256(source: DataSource) -> str:
    """Identifies a data source: its options, and its files' contents where it is local."""
    path = Path(source.path)
    content = ""
    if path.is_file():
        content = file_sha256(path)
    elif path.is_dir():
        content = files_sha256(file for file in path.rglob("*") if file.is_file())
    return fingerprint("data", source.model_dump(exclude={"path"}), {"content": content})


def _load_rows(task: str, source: DataSource) -> Any:
    import datasets

    path = Path(source.path)
    if not path.exists() and not looks_like_hub_id(source.path):
        raise RecipeError(f"task {task!r}: {source.path}: no such file or folder")
    datasets.disable_progress_bars()
    try:
        if path.is_file():
            builder = _BUILDERS.get(path.suffix)
            if builder is None:
                raise RecipeError(
                    f"task {task!r}: {source.path}: unknown kind of file; "
                    f"known: {', '.join(_BUILDERS)}"
                )
            loaded = datasets.load_dataset(builder, source.subset, data_files=str(path))
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(source.path, source.subset)
    except RecipeError:
        raise
    except Exception as error:  # datasets raises a different type for every loader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"task {task!r}: {source.path} cannot be loaded ({reason})") from error
    if not isinstance(loaded, dict):
        return loaded
    split = source.split or (next(iter(loaded)) if len(loaded) == 1 else None)
    if split not in loaded:
        raise RecipeError(
            f"task {task!r}: {source.path}: split {split!r} not found, name one of "
            f"{', '.join(loaded)} as split"
        )
    return loaded[split]
