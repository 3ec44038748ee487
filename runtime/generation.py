"""Writing texts greedily with exported graphs, token by token, keys and values kept."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from epmq_deploy.models.writer import SpecialTokens, WriterFamily
from epmq_deploy.runtime.sessions import Graph

Array = npt.NDArray[Any]
Values = dict[str, Array]
_PAST, _PRESENT = "past_key_values.", "present."


class TextWriter(ABC):
    """The graphs of one format, which together write texts.

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
            Logits ``[B, V]`` of the first token to write, and what ``go_on`` needs.
        """

    @abstractmethod
    def go_on(self, token: Array, values: Values) -> tuple[Array, Values]:
        """Logits ``[B, V]`` of what follows a token, int64 ``[B, 1]``, and values for the next."""

    def write(self, ids: Tensor, mask: Tensor, length: int | None = None) -> Tensor:
        """The likeliest token after the other, int64 ``[B, length]``; padding behind each end.

        Args:
            ids: int64 ``[B, T]``.
            mask: likewise.
            length: tokens to write whatever they are; up to the end of all answers when absent.
        """
        logits, values = self.begin(ids.numpy(), mask.numpy())
        ended = np.zeros(len(logits), dtype=np.bool_)
        written: list[Array] = []
        while True:
            token = np.where(ended, self._special.padding, logits.argmax(axis=1))
            written.append(token)
            ended |= np.isin(token, self._special.end)
            done = ended.all() if length is None else len(written) >= length
            if done or len(written) == self._max_tokens:
                return torch.from_numpy(np.stack(written, axis=1))
            logits, values = self.go_on(token[:, None].astype(np.int64), values)

    def run(self, inputs: Sequence[Tensor], outputs: object = None) -> Mapping[str, Array]:
        """A whole answer, for timing: ``inputs`` are token ids, mask and number of tokens."""
        ids, mask, length = inputs
        return {"answers": self.write(ids, mask, int(length)).numpy()}


class EncoderDecoderWriter(TextWriter):
    """Three graphs: cross attention's keys and values are computed once, by the second.

    Args:
        encoder: ``encoder_model``.
        first: ``decoder_model``.
        further: ``decoder_with_past_model``.
        special: ids that steer writing.
        max_tokens: longest answer.
    """

    def __init__(
        self, encoder: Graph, first: Graph, further: Graph, special: SpecialTokens, max_tokens: int
    ) -> None:
        super().__init__(special, max_tokens)
        self._encoder, self._first, self._further = encoder, first, further

    @property
    def provider(self) -> str:
        """See base."""
        return self._encoder.provider

    def begin(self, ids: Array, mask: Array) -> tuple[Array, Values]:
        """See base."""
        read = _run(self._encoder, {"input_ids": ids, "attention_mask": mask})
        assert self._special.start is not None, "an encoder-decoder has one"
        begun = {
            "encoder_attention_mask": mask,
            "input_ids": np.full((len(ids), 1), self._special.start, dtype=np.int64),
            "encoder_hidden_states": read["last_hidden_state"],
        }
        logits, present = _answer(self._first, begun)
        return logits, {"encoder_attention_mask": mask, **present}

    def go_on(self, token: Array, values: Values) -> tuple[Array, Values]:
        """See base."""
        logits, present = _answer(self._further, {"input_ids": token, **values})
        # Keys and values of cross attention stay.
        return logits, values | present


class CausalWriter(TextWriter):
    """One graph, whose past is empty when it reads the text.

    Args:
        graph: ``model``.
        special: ids that steer writing.
        max_tokens: longest answer.
    """

    def __init__(self, graph: Graph, special: SpecialTokens, max_tokens: int) -> None:
        super().__init__(special, max_tokens)
        self._graph = graph

    @property
    def provider(self) -> str:
        """See base."""
        return self._graph.provider

    def begin(self, ids: Array, mask: Array) -> tuple[Array, Values]:
        """See base; texts are filled up in front."""
        empty = {
            name: np.zeros((len(ids), shape[1], 0, shape[3]), dtype=np.float32)
            for name, shape in self._graph.input_shapes.items()
            if name.startswith(_PAST)
        }
        # Padding in front has no position of its own.
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        return self._run(ids, mask, positions, empty)

    def go_on(self, token: Array, values: Values) -> tuple[Array, Values]:
        """See base."""
        before = values.pop("attention_mask")
        mask = np.concatenate([before, np.ones_like(token)], axis=1)
        return self._run(token, mask, mask.sum(axis=1, keepdims=True) - 1, values)

    def _run(self, ids: Array, mask: Array, positions: Array, past: Values) -> tuple[Array, Values]:
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        logits, present = _answer(self._graph, feed)
        return logits, {"attention_mask": mask, **present}


def text_writer(
    family: WriterFamily, folder: Path, parts: Mapping[str, Graph], max_tokens: int
) -> TextWriter:
    """What writes with the graphs of one format.

    Args:
        family: of the model.
        folder: with its settings.
        parts: graphs by part.
        max_tokens: longest answer.
    """
    special = family.special_tokens(folder)
    if not family.has_encoder:
        return CausalWriter(parts["model"], special, max_tokens)
    names = ("encoder_model", "decoder_model", "decoder_with_past_model")
    encoder, first, further = (parts[name] for name in names)
    return EncoderDecoderWriter(encoder, first, further, special, max_tokens)


def _answer(graph: Graph, feed: Values) -> tuple[Array, Values]:
    """Logits of the last token, and keys and values as the next run takes them."""
    found = _run(graph, feed)
    present = {
        name.replace(_PRESENT, _PAST, 1): value
        for name, value in found.items()
        if name.startswith(_PRESENT)
    }
    return found["logits"][:, -1], present


def _run(graph: Graph, feed: Values) -> Values:
    inputs = [torch.from_numpy(feed[name]) for name in graph.input_names]
    return dict(graph.run(inputs))
