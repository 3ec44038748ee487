"""What an exported model says of the words of a text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epmq_deploy.models.text_inputs import WordSpan
from epmq_deploy.runtime.evaluation.entity_f1 import entities_of, spell_entities


@dataclass(frozen=True)
class Span:
    """A part of a text with a label.

    Attributes:
        label: of a word its tag, like ``B-PER``; of an entity its type, like ``PER``.
        text: the part itself.
        start: its first character.
        stop: the character after its last.
        score: probability of the tag; of an entity, the mean over its words.
    """

    label: str
    text: str
    start: int
    stop: int
    score: float


@dataclass(frozen=True)
class LabelledText:
    """The words of a text with their tags; words beyond the longest text are left out.

    Attributes:
        words: all that were read.
        entities: what tags like ``B-PER`` and ``I-PER`` spell; empty where there are no such tags.
    """

    words: tuple[Span, ...]
    entities: tuple[Span, ...]


def labelled_text(
    text: str, words: Sequence[WordSpan], logits: npt.NDArray[np.float32], tags: Sequence[str]
) -> LabelledText:
    """Return the words of a text with their most likely tags.

    Args:
        text: that was read.
        words: in it.
        logits: of its tokens, ``[T, C]``; a word's are those of its first token.
        tags: names of the classes.
    """
    exact = logits[[word.token for word in words]].astype(np.float64)
    chances = np.exp(exact - exact.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    spans = tuple(
        _span(tags[best], text, word.start, word.stop, chance[best])
        for word, chance in zip(words, chances, strict=True)
        for best in [int(chance.argmax())]
    )
    if not spell_entities(tags):
        return LabelledText(spans, ())
    entities = tuple(
        _span(
            kind,
            text,
            spans[first].start,
            spans[last].stop,
            np.mean([span.score for span in spans[first : last + 1]]),
        )
        for kind, first, last in entities_of([span.label for span in spans])
    )
    return LabelledText(spans, entities)


def _span(label: str, text: str, start: int, stop: int, score: float | np.floating) -> Span:
    return Span(label, text[start:stop], start, stop, float(score))
