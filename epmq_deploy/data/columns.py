"""Checks of the columns that hold a task's inputs."""

from collections.abc import Iterator
from typing import Any

from epmq_deploy.errors import RecipeError

_BATCH = 1000
_BYTES = frozenset(("binary", "large_binary"))
_TEXTS = frozenset(("string", "large_string"))
# Of a column without any value.
_NULL = frozenset(("null",))


def with_images(rows: Any, column: str, where: str) -> Any:
    """Return the rows with an input column of stored images, ``{bytes, path}``.

    Args:
        rows: a ``datasets.Dataset``.
        column: holds images as ``datasets`` or the hub store them, encoded bytes or file paths.
        where: what to call the data in messages.

    Raises:
        RecipeError: the column holds something else, or a row nothing; names the first such row.
    """
    from datasets import Image

    feature = rows.features[column]
    if not isinstance(feature, Image) and not _stores_images(feature):
        raise RecipeError(
            f"{where}: column {column!r} holds {feature}, expected images, encoded bytes or paths"
        )
    # Read by ``models.images`` alone, in calibration, evaluation and applications alike.
    rows = rows.cast_column(column, Image(decode=False))
    if empty := list(_rows_without_image(rows, column)):
        more = f", like {len(empty) - 1} more rows" if len(empty) > 1 else ""
        raise RecipeError(
            f"{where}: row {empty[0]} holds no image in column {column!r}{more}; remove what is "
            "empty"
        )
    return rows


def _rows_without_image(rows: Any, column: str) -> Iterator[int]:
    start = 0
    for batch in rows.select_columns([column]).with_format("arrow").iter(_BATCH):
        for stored in batch[column].chunks:
            content, paths = stored.flatten()
            empty = zip(content.is_null().to_pylist(), paths.to_pylist(), strict=True)
            yield from (
                start + row
                for row, (no_content, path) in enumerate(empty)
                if no_content and not path
            )
            start += len(stored)


def _stores_images(feature: Any) -> bool:
    """Whether a column without the type of an image holds bytes, paths, or both in each row."""
    if isinstance(feature, dict):
        kinds = {"bytes": _BYTES | _NULL, "path": _TEXTS | _NULL}
        return bool(feature) and all(
            getattr(value, "dtype", None) in kinds.get(name, ()) for name, value in feature.items()
        )
    return getattr(feature, "dtype", None) in _BYTES | _TEXTS


def check_words(rows: Any, column: str, where: str) -> None:
    """Make sure that a column holds a list of words in every row.

    Raises:
        RecipeError: it does not; names the first row without one.
    """
    feature = rows.features[column]
    held = getattr(feature, "feature", None)
    if getattr(held, "dtype", None) not in _TEXTS:
        raise RecipeError(
            f"{where}: column {column!r} holds {feature}, expected lists of words, as labels of "
            "words need"
        )
    for row, words in enumerate(rows.select_columns([column])[column]):
        if words is None or None in words:
            missing = "nothing" if words is None else "a word that is null"
            raise RecipeError(f"{where}: row {row} holds {missing} in column {column!r}")


def check_texts(rows: Any, column: str, where: str) -> None:
    """Make sure that a column holds a text in every row.

    Raises:
        RecipeError: it does not; names the first row without one.
    """
    feature = rows.features[column]
    if getattr(feature, "dtype", None) not in _TEXTS:
        raise RecipeError(f"{where}: column {column!r} holds {feature}, expected texts")
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    try:
        values.validate(full=True)
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise RecipeError(f"{where}: column {column!r} is not UTF-8 ({error})") from error
    if values.null_count:
        row = values.is_null().index(True).as_py()
        raise RecipeError(f"{where}: row {row} holds no text in column {column!r}")
