"""Rows of a data source, opened with ``datasets``."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from epmq_deploy.checkpoints.hub import hub_id
from epmq_deploy.data import csv_table
from epmq_deploy.data.column_names import label_columns
from epmq_deploy.data.conversion_cache import cache_folder
from epmq_deploy.data.image_folder import ImageFolder
from epmq_deploy.data.json_rows import key_of_rows
from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import DataSource

Split = TypeVar("Split")

log = logging.getLogger(__name__)

# Characters of another library's message that are shown.
_LONGEST = 300
_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json"}


def load_rows(task: str, source: DataSource) -> Any:
    """Open a data source as a ``datasets.Dataset``.

    Args:
        task: name used in messages.
        source: a local file or folder, or a data set of the hub.

    Raises:
        RecipeError: it cannot be opened, or has several splits and none is chosen.
    """
    import datasets

    path = Path(source.path)
    where = f"task {task!r}: {source.path}"
    on_hub = None if path.exists() else hub_id(source.path)
    if not path.exists() and on_hub is None:
        raise RecipeError(f"{where}: no such file or folder")
    datasets.disable_progress_bars()
    try:
        if path.is_file() and path.suffix.lower() in csv_table.SUFFIXES:
            # Named as datasets names the only split of other files.
            opened = {"train": csv_table.read_csv(path, where, label_columns(source))}
        elif path.is_file():
            builder = _BUILDERS.get(path.suffix.lower())
            if builder is None:
                known = ", ".join((*_BUILDERS, *csv_table.SUFFIXES))
                raise RecipeError(f"{where}: unknown kind of file; known: {known}")
            _check_file(path, where)
            options = _json_options(path, source, where) if builder == "json" else {}
            opened = datasets.load_dataset(
                builder, data_files=str(path), cache_dir=cache_folder(), **options
            )
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            opened = datasets.load_from_disk(str(path))
        elif on_hub is not None:
            opened = datasets.load_dataset(
                on_hub.repository, source.subset, revision=on_hub.revision
            )
        elif (images := ImageFolder.scan(path)).holds_images:
            return images.split(source.split, where).rows(where)
        elif splits := csv_table.csv_splits(path):
            chosen = _split(splits, source.split, where)
            return datasets.concatenate_datasets(
                [
                    csv_table.read_csv(file, f"{where}: {file.name}", label_columns(source))
                    for file in chosen
                ]
            )
        else:
            opened = datasets.load_dataset(source.path, source.subset, cache_dir=cache_folder())
    except RecipeError:
        raise
    except Exception as error:  # datasets raises a different type for every loader
        raise RecipeError(f"{where} cannot be loaded ({reason(error)})") from error
    if not isinstance(opened, dict):
        if source.split is not None:
            raise RecipeError(f"{where} has no splits, but split {source.split!r} was asked for")
        return opened
    return _split(opened, source.split, where)


def _split(splits: Mapping[str, Split], name: str | None, where: str) -> Split:
    """Return the split of that name, or the only one.

    Raises:
        RecipeError: there is none of that name, or several and no name.
    """
    if name is None and len(splits) == 1:
        return next(iter(splits.values()))
    if name is None:
        raise RecipeError(f"{where} has several splits: name one of {', '.join(splits)} as split")
    if name not in splits:
        raise RecipeError(
            f"{where}: split {name!r} not found, name one of {', '.join(splits)} as split"
        )
    return splits[name]


def _json_options(file: Path, source: DataSource, where: str) -> dict[str, str]:
    """Return where a JSON file has its rows, where they are below a key."""
    named = (source.input_column, *(source.input_columns or ()), source.label_column)
    columns = frozenset(name.partition(".")[0] for name in named if name is not None)
    key = key_of_rows(file, columns) if file.suffix.lower() == ".json" else None
    if key is None:
        return {}
    log.info("%s is one object: its rows are those below key %r", where, key)
    return {"field": key}


def _check_file(file: Path, where: str) -> None:
    """Make sure that a file holds anything, and JSON is UTF-8.

    Raises:
        RecipeError: it does not, or is not.
    """
    if file.stat().st_size == 0:
        raise RecipeError(f"{where} is empty")
    if _BUILDERS[file.suffix.lower()] == "json" and (problem := csv_table.not_utf8(file)):
        raise RecipeError(f"{where} is not UTF-8, as JSON must be ({problem}); save it as UTF-8")


def reason(error: BaseException) -> str:
    """Return what an error says, in one line; of an error of ``datasets``, what it is caused by."""
    from datasets.exceptions import DatasetGenerationError

    # Its own message says only that an error occurred.
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
