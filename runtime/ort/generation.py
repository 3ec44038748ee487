"""Generate text greedily with exported graphs, token by token, with a cache of keys and values.

Imports nothing but numpy, because `probe` runs it in a small process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from epmq_deploy.models.text_generation.special_tokens import SpecialTokens

Array = npt.NDArray[Any]
Values = dict[str, Array]
_PAST, _PRESENT = "past_key_values.", "present."


class Computes(Protocol):
    """A graph that is ready to run."""

    @property
    def provider(self) -> str:
        """The execution provider that runs it."""

    @property
    def input_shapes(self) -> Mapping[str, tuple[Any, ...]]:
        """By input name; open axes by their names."""

    def compute(self, feed: Mapping[str, Array]) -> Values:
        """All outputs by name, from arrays by input name."""


class TextGenerator(ABC):
    """The graphs of one format, which generate text together.

    Args:
        special: ids that steer writing.
        max_tokens: longest answer.
    """

    def __init__(self, special: SpecialTokens, max_tokens: int) -> None:
        self._special = special
        self._max_tokens = max_tokens

    @property
    @abstractmethod
    def provider(self) -> str:
        """The execution provider that runs the graphs."""

    @abstractmethod
    def begin(self, ids: Array, mask: Array) -> tuple[Array, Values]:
        """Read texts.

        Args:
            ids: int64 ``[B, T]``.
            mask: likewise.

        Returns:
            Logits ``[B, V]`` of the first token to generate, and what ``go_on`` needs.
        """

    @abstractmethod
    def go_on(self, token: Array, values: Values) -> tuple[Array, Values]:
        """Logits ``[B, V]`` of what follows a token, int64 ``[B, 1]``, and values for the next."""

    def write(self, ids: npt.ArrayLike, mask: npt.ArrayLike, length: int | None = None) -> Array:
        """Return the likeliest tokens, int64 ``[B, length]``, right-padded behind each end.

        Args:
            ids: int64 ``[B, T]``.
            mask: likewise.
            length: number of tokens to generate, whatever they are; default: up to the end of all
                answers.
        """
        return self.write_on(*self.begin(np.asarray(ids), np.asarray(mask)), length)

    def write_on(self, logits: Array, values: Values, length: int | None = None) -> Array:
        """As ``write``, from what ``begin`` gave."""
        ended = np.zeros(len(logits), dtype=np.bool_)
        written: list[Array] = []
        while True:
            token = np.where(ended, self._special.padding, logits.argmax(axis=1))
            written.append(token)
            ended |= np.isin(token, self._special.end)
            done = ended.all() if length is None else len(written) >= length
            if done or len(written) == self._max_tokens:
                return np.stack(written, axis=1)
            logits, values = self.go_on(token[:, None].astype(np.int64), values)

    def likelihoods(self, logits: Array, values: Values, answers: Sequence[Sequence[int]]) -> Array:
        """Log-probabilities of generating exactly these answers, float64 ``[B, C]``.

        Args:
            logits: as ``begin`` gave them.
            values: likewise.
            answers: token ids of each, without its end.
        """
        likelihoods = []
        for answer in answers:
            following, state, total = _log_softmax(logits), values, np.zeros(len(logits))
            for token in answer:
                total = total + following[:, token]
                next_logits, state = self.go_on(np.full((len(logits), 1), token), state)
                following = _log_softmax(next_logits)
            ends = following[:, list(self._special.end)]
            likelihoods.append(total + np.logaddexp.reduce(ends, axis=1))
        return np.stack(likelihoods, axis=1)

    def run(self, inputs: Sequence[npt.ArrayLike], outputs: object = None) -> Mapping[str, Array]:
        """Return a whole answer, for timing; ``inputs`` are ids, mask and number of tokens."""
        ids, mask, length = inputs
        return {"answers": self.write(ids, mask, int(np.asarray(length)))}


class EncoderDecoderGenerator(TextGenerator):
    """Three graphs: cross attention's keys and values are computed once, by the second.

    Args:
        encoder: ``encoder_model``.
        first: ``decoder_model``.
        further: ``decoder_with_past_model``.
        special: ids that steer writing.
        max_tokens: longest answer.
    """

    def __init__(
        self,
        encoder: Computes,
        first: Computes,
        further: Computes,
        special: SpecialTokens,
        max_tokens: int,
    ) -> None:
        super().__init__(special, max_tokens)
        self._encoder, self._first, self._further = encoder, first, further

    @property
    def provider(self) -> str:
        """The execution provider of all graphs."""
        return self._encoder.provider

    def begin(self, ids: Array, mask: Array) -> tuple[Array, Values]:
        """Run the prompt and return logits and caches."""
        read = self._encoder.compute({"input_ids": ids, "attention_mask": mask})
        assert self._special.start is not None, "an encoder-decoder has one"
        begun = {
            "encoder_attention_mask": mask,
            "input_ids": np.full((len(ids), 1), self._special.start, dtype=np.int64),
            "encoder_hidden_states": read["last_hidden_state"],
        }
        logits, present = _answer(self._first, begun)
        return logits, {"encoder_attention_mask": mask, **present}

    def go_on(self, token: Array, values: Values) -> tuple[Array, Values]:
        """Run one more token and return logits and caches."""
        logits, present = _answer(self._further, {"input_ids": token, **values})
        # Keys and values of cross attention stay.
        return logits, values | present


class CausalGenerator(TextGenerator):
    """One graph, whose past is empty when it reads the text.

    Args:
        graph: ``model``.
        special: ids that steer writing.
        max_tokens: longest answer.
    """

    def __init__(self, graph: Computes, special: SpecialTokens, max_tokens: int) -> None:
        super().__init__(special, max_tokens)
        self._graph = graph

    @property
    def provider(self) -> str:
        """The execution provider of all graphs."""
        return self._graph.provider

    def begin(self, ids: Array, mask: Array) -> tuple[Array, Values]:
        """Run the prompt and return logits and caches; texts are left-padded."""
        empty = {
            name: np.zeros((len(ids), shape[1], 0, shape[3]), dtype=np.float32)
            for name, shape in self._graph.input_shapes.items()
            if name.startswith(_PAST)
        }
        # Padding in front has no position of its own.
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        return self._run(ids, mask, positions, empty)

    def go_on(self, token: Array, values: Values) -> tuple[Array, Values]:
        """Run one more token and return logits and caches."""
        mask = np.concatenate([values["attention_mask"], np.ones_like(token)], axis=1)
        return self._run(token, mask, mask.sum(axis=1, keepdims=True) - 1, values)

    def _run(self, ids: Array, mask: Array, positions: Array, past: Values) -> tuple[Array, Values]:
        feed = {**past, "input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits, present = _answer(self._graph, feed)
        return logits, {"attention_mask": mask, **present}


def text_generator(
    graphs: Sequence[Computes], special: SpecialTokens, max_tokens: int
) -> TextGenerator:
    """Return the text generator of one format's graphs, given in the order they run."""
    if len(graphs) == 1:
        return CausalGenerator(graphs[0], special, max_tokens)
    encoder, first, further = graphs
    return EncoderDecoderGenerator(encoder, first, further, special, max_tokens)


def _answer(graph: Computes, feed: Values) -> tuple[Array, Values]:
    """Logits of the last token, and keys and values as the next run takes them."""
    outputs = graph.compute({name: feed[name] for name in graph.input_shapes})
    present = {
        name.replace(_PRESENT, _PAST, 1): value
        for name, value in outputs.items()
        if name.startswith(_PRESENT)
    }
    return outputs["logits"][:, -1], present


def _log_softmax(logits: Array) -> Array:
    """Along the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    less: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return less
