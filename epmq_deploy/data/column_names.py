"""Which columns of a data set hold a task's inputs and labels."""

import logging
from collections.abc import Collection, Sequence
from typing import Any

from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import LABEL_COLUMN, DataSource

log = logging.getLogger(__name__)

# What data sets of the hub call their inputs and labels, beside the name that is the default.
_INPUTS = {
    "image": ("img", "picture", "jpg", "png", "pixel_values", "file", "file_name", "image_path"),
    "text": ("sentence", "content", "review", "document", "tweet", "input", "texts", "sentences"),
}
_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "answer"),
    ("question", "passage"),
    ("query", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
_WORDS = ("tokens", "words")
# The first that is there: data sets that label words in several ways are mostly for entities.
_WORD_LABELS = ("ner_tags", "tags", "labels", "ner", "pos_tags", "chunk_tags")
# How similar, or how relevant to each other, the texts of a pair are.
_SCORES = ("score", "similarity_score", "similarity", "relevance", "labels")
_LABELS = ("labels", "label_id", "label_ids", "target", "class", "coarse_label", "fine_label")


def input_columns(rows: Any, source: DataSource, modality: str, where: str) -> tuple[str, ...]:
    """Return the columns that hold the inputs, one or a pair: the recipe's, or the obvious one.

    Args:
        rows: a ``datasets.Dataset``.
        source: where the rows came from.
        modality: of the model: ``image`` or ``text``.
        where: what to call the data in messages.

    Raises:
        RecipeError: a column is missing, or none or several can be meant.
    """
    names = rows.column_names
    given = source.input_columns or (source.input_column and (source.input_column,))
    if given:
        for column in given:
            if column not in names:
                raise RecipeError(f"{where} has no column {column!r}; it has {', '.join(names)}")
        return tuple(given)
    if modality in names:
        return (modality,)
    likely = [name for name in names if name.casefold() in (modality, *_INPUTS[modality])]
    pairs = [pair for pair in _PAIRS if modality == "text" and set(pair) <= set(names)]
    if pairs and not likely:
        raise RecipeError(
            f"{where} has no column {modality!r}; it seems to hold pairs of texts: give "
            f"input_columns: [{', '.join(pairs[0])}], or input_column for one of "
            f"{', '.join(names)}"
        )
    if len(likely) == 1 and not pairs:
        log.info("%s: no column %r, taking %r for the inputs", where, modality, likely[0])
        return (likely[0],)
    raise RecipeError(
        f"{where} has no column {modality!r}; it has {', '.join(names)}; name the one with the "
        "inputs as input_column"
    )


def word_columns(names: Sequence[str], source: DataSource, where: str) -> tuple[str, str | None]:
    """Return the columns that hold lists of words, and of their labels.

    Args:
        names: of the columns.
        source: where they came from.
        where: what to call the data in messages.

    Raises:
        RecipeError: the column of words is missing, or two columns are given.
    """
    if source.input_columns is not None:
        raise RecipeError(f"{where}: input_columns is for pairs of texts, not for labels of words")
    words = source.input_column or next((name for name in _WORDS if name in names), _WORDS[0])
    if words not in names:
        raise RecipeError(
            f"{where} has no column {words!r}; it has {', '.join(names)}; name the one with lists "
            "of words as input_column"
        )
    labels = source.label_column
    if labels == LABEL_COLUMN and LABEL_COLUMN not in names:
        labels = next((name for name in _WORD_LABELS if name in names), labels)
        log.info("%s: taking %r for the words, %r for their labels", where, words, labels)
    return words, labels


def compared_columns(
    rows: Any, source: DataSource, where: str
) -> tuple[tuple[str, ...], str | None]:
    """Return the columns of texts to embed, one or a pair, and the one that says how similar.

    Args:
        rows: a ``datasets.Dataset``.
        source: where the rows came from.
        where: what to call the data in messages.

    Raises:
        RecipeError: a column is missing, or none or several can be meant.
    """
    names = rows.column_names
    pairs = [pair for pair in _PAIRS if set(pair) <= set(names)]
    if source.input_column is None and source.input_columns is None and len(pairs) == 1:
        log.info("%s: taking %s for the texts that are compared", where, " and ".join(pairs[0]))
        texts: tuple[str, ...] = pairs[0]
    else:
        texts = input_columns(rows, source, "text", where)
    scores = [name for name in _SCORES if name in names]
    if source.label_column != LABEL_COLUMN or LABEL_COLUMN in names or len(scores) != 1:
        return texts, source.label_column
    log.info("%s: no column %r, taking %r", where, LABEL_COLUMN, scores[0])
    return texts, scores[0]


def label_column(names: Sequence[str], source: DataSource, where: str) -> str | None:
    """Return the column that holds the labels; another usual one where the default is missing.

    Args:
        names: of the columns.
        source: where they came from.
        where: what to call the data in messages.
    """
    likely = [name for name in names if name.casefold() in (LABEL_COLUMN, *_LABELS)]
    if source.label_column != LABEL_COLUMN or LABEL_COLUMN in names or len(likely) != 1:
        return source.label_column
    log.info("%s: no column %r, taking %r for the labels", where, LABEL_COLUMN, likely[0])
    return likely[0]


def label_columns(source: DataSource) -> Collection[str]:
    """Return the columns that may hold a data source's labels."""
    usual = (LABEL_COLUMN, *_LABELS, *_SCORES) if source.label_column == LABEL_COLUMN else ()
    spelled = [spell(name) for name in usual for spell in (str.lower, str.upper, str.capitalize)]
    named = source.label_columns or (source.label_column or "",)
    return {*named, *spelled}


def with_fields(rows: Any, columns: Sequence[str | None]) -> Any:
    """Return the rows with every nested field that is asked for, ``a.b``, as a column."""
    for column in columns:
        while column and column not in rows.column_names:
            parents = [name for name in rows.column_names if column.startswith(f"{name}.")]
            if not parents or not isinstance(rows.features[parents[0]], dict):
                break
            rows = rows.flatten()
    return rows
