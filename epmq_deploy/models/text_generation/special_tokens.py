"""Token ids that control generation, from all places where a model's folder may say them."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from epmq_deploy.checkpoints.files import GENERATION_FILE, read_json_if_there
from epmq_deploy.errors import RecipeError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that control generation.

    Attributes:
        start: the decoder's first token; None where it continues the text it read.
        end: any of them ends an answer; the first one is that of answers to learn from.
        padding: of shorter texts.
    """

    start: int | None
    end: tuple[int, ...]
    padding: int


def generation_config(folder: Path) -> dict[str, Any]:
    """Return the content of ``generation_config.json``; empty without one.

    Raises:
        RecipeError: it is not a JSON object.
    """
    return read_json_if_there(folder / GENERATION_FILE) or {}


def listed_ids(value: Any) -> tuple[Any, ...]:
    """Return ids that are given as one number, a list or not at all."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def is_token(value: Any, vocabulary: int) -> bool:
    """Tell whether a value is the id of a token of a vocabulary of that size."""
    return type(value) is int and 0 <= value < vocabulary


def end_tokens(
    folder: Path, config: Mapping[str, Any], tokenizer: Any, default: int | None = None
) -> tuple[int, ...]:
    """Return all ids that end an answer: those of config, generation config and tokenizer.

    Args:
        folder: the model's.
        config: its ``config.json``.
        tokenizer: its tokenizer.
        default: what the config means without ``eos_token_id``.

    Raises:
        RecipeError: there are none.
    """
    vocabulary = int(config["vocab_size"])
    places = {
        "config.json": config.get("eos_token_id", default),
        GENERATION_FILE: generation_config(folder).get("eos_token_id"),
        "the tokenizer": tokenizer.eos_token_id,
    }
    ids = {place: listed_ids(value) for place, value in places.items()}
    _say_ends(folder, tuple(ids.items()), vocabulary)
    valid = [token for each in ids.values() for token in each if is_token(token, vocabulary)]
    if not valid:
        raise RecipeError(
            f"{folder}: no eos_token_id in config.json, {GENERATION_FILE} or the tokenizer that is "
            f"a token of the vocabulary ({vocabulary} tokens), so no answer would end"
        )
    return tuple(dict.fromkeys(valid))


@lru_cache(maxsize=64)
def _say_ends(folder: Path, ids: tuple[tuple[str, tuple[Any, ...]], ...], vocabulary: int) -> None:
    """Log, once, where places differ and which ids are no tokens."""
    if len({frozenset(map(str, each)) for _, each in ids if each}) > 1:
        texts = (f"{', '.join(map(str, each))} ({place})" for place, each in ids if each)
        log.info("%s: any of these tokens ends an answer: %s", folder, "; ".join(texts))
    for place, each in ids:
        for token in each:
            if not is_token(token, vocabulary):
                log.warning(
                    "%s: eos_token_id %s (%s) is no token of the vocabulary and left out",
                    folder,
                    token,
                    place,
                )


def padding_token(folder: Path, config: Mapping[str, Any], instead: int) -> int:
    """Return the id that pads shorter texts, which no model reads.

    Args:
        folder: the model's.
        config: its ``config.json``.
        instead: taken where the config has none, or one that is no token.
    """
    padding, vocabulary = config.get("pad_token_id"), int(config["vocab_size"])
    if padding is not None and not is_token(padding, vocabulary):
        _say_padding(folder, padding, instead)
        return instead
    return instead if padding is None else int(padding)


@lru_cache(maxsize=64)
def _say_padding(folder: Path, padding: Any, instead: int) -> None:
    log.info(
        "%s: pad_token_id %s is no token of the vocabulary; %d pads instead",
        folder,
        padding,
        instead,
    )


def until_end(ids: Tensor, ends: Iterable[int]) -> list[list[int]]:
    """Return answers ``[B, T]`` as lists of ids before the first token that ends each."""
    stop = frozenset(ends)
    answers = []
    for row in ids.tolist():
        length = next((index for index, token in enumerate(row) if token in stop), len(row))
        answers.append(row[:length])
    return answers


def count_endless(ids: Tensor, ends: Iterable[int]) -> int:
    """Count the answers of ``[B, T]`` that no token ends."""
    return sum(len(answer) == ids.shape[1] for answer in until_end(ids, ends))


def warn_of_endless(count: int, total: int, whose: str, option: str, limit: int) -> None:
    """Warn where most answers were cut at the limit instead of ending by themselves.

    Args:
        count: answers without an end.
        total: all of them.
        whose: answers they are.
        option: that sets the limit.
        limit: in tokens.
    """
    if 2 * count > total:
        log.warning(
            "%s: %d of %d answers do not end within %s (%d tokens); raise it, or check that "
            "eos_token_id is the token that the experts end their answers with",
            whose,
            count,
            total,
            option,
            limit,
        )
