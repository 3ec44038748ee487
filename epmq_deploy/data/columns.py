"""Checks of the columns that hold a task's inputs."""

from pathlib import Path
from typing import Any

from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import DataSource


def with_images(rows: Any, column: str, source: DataSource, where: str) -> Any:
    """Return the rows with an input column that decodes to images.

    Args:
        rows: a ``datasets.Dataset``.
        column: holds stored images, encoded bytes or file paths.
        source: where the rows came from.
        where: what to call the data in messages.

    Raises:
        RecipeError: the column holds something else.
    """
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


def check_texts(rows: Any, column: str, where: str) -> None:
    """Make sure that a column holds a text in every row.

    Raises:
        RecipeError: it does not; names the first row without one.
    """
    feature = rows.features[column]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise RecipeError(f"{where}: column {column!r} holds {feature}, expected texts")
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    if values.null_count:
        row = values.is_null().index(True).as_py()
        raise RecipeError(f"{where}: row {row} holds no text in column {column!r}")
