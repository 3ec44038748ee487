"""The graphs of text-generation models, named as optimum and transformers.js expect them.

An encoder-decoder becomes three: ``encoder_model`` reads the text, ``decoder_model`` begins the
answer and computes keys and values of cross attention once, ``decoder_with_past_model`` goes on
token by token. A decoder becomes one, ``model``, whose past is empty at first.

Keys and values are ``past_key_values.N.*`` going in and ``present.N.*`` coming out, float32
``[batch, heads, length, width]``.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.exporters.compat import filled_cache
from epmq_deploy.exporters.verification.parity import ParityInputs
from epmq_deploy.models.deployable import Deployable
from epmq_deploy.models.text_generation.base import (
    CacheShape,
    EncoderDecoderLayout,
    TextGenerationFamily,
)

PARTS = ("key", "value")
_BATCH, _LENGTH = 2, 5
# Tokens of a text that graphs are compared on.
_LONGEST = 32


class TextGenerationGraph(Deployable):
    """One graph of a text-generation model.

    Args:
        backbone: the whole model.
        cache: shape of the keys and values that its decoder's blocks keep.
    """

    def __init__(self, backbone: nn.Module, cache: CacheShape) -> None:
        super().__init__()
        self.backbone = backbone
        self.cache = cache

    @abstractmethod
    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return a batch of 2, as ``input_names``."""

    @abstractmethod
    def calls(self, batch: tuple[Tensor, ...]) -> Sequence[tuple[Tensor, ...]]:
        """Return inputs, as ``input_names``, that the graph runs on while it generates answers.

        Args:
            batch: texts with their answers, as the family's ``collate`` returns them.
        """

    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """Return the names of the axes that are left open, as ``input_names``."""
        return tuple(self._axes(name) for name in self.input_names)

    def _axes(self, name: str) -> dict[int, str]:
        if name.startswith("past_key_values."):
            return {0: "batch", 2: "encoder_sequence" if ".encoder." in name else "past_sequence"}
        if name.startswith("encoder_"):
            return {0: "batch", 1: "encoder_sequence"}
        return {0: "batch", 1: "sequence"}


class EncoderDecoderGraph(TextGenerationGraph):
    """One graph of an encoder-decoder.

    Args:
        backbone: the whole model.
        cache: shape of the keys and values that its decoder's blocks keep.
        layout: names of the backbone's parts.
    """

    def __init__(
        self, backbone: nn.Module, cache: CacheShape, layout: EncoderDecoderLayout
    ) -> None:
        super().__init__(backbone, cache)
        self.layout = layout


class EncoderGraph(EncoderDecoderGraph):
    """Text to hidden states ``[batch, encoder_sequence, D]``."""

    stem = "encoder_model"

    @property
    def input_names(self) -> tuple[str, ...]:
        """Return the graph's inputs, as ``forward`` takes them."""
        return ("input_ids", "attention_mask")

    @property
    def output_names(self) -> tuple[str, ...]:
        """Return the graph's outputs, as ``forward`` returns them."""
        return ("last_hidden_state",)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what ``output_names`` lists."""
        ids, mask = inputs
        encoder = self.backbone.get_submodule(self.layout.encoder)
        return (encoder(input_ids=ids, attention_mask=mask).last_hidden_state,)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return a batch of 2 with padding."""
        return _ids(), _mask()

    def calls(self, batch: tuple[Tensor, ...]) -> Sequence[tuple[Tensor, ...]]:
        """Return one call with the texts."""
        return [batch[:2]]

    def runs(self, layer: str) -> bool:
        """Whether a layer is the embedding or in a block of the encoder."""
        return self.layout.encodes(layer)

    def _axes(self, name: str) -> dict[int, str]:
        return {0: "batch", 1: "encoder_sequence"}


class DecoderGraph(EncoderDecoderGraph):
    """The answer's first token, and keys and values of all attention."""

    stem = "decoder_model"

    @property
    def input_names(self) -> tuple[str, ...]:
        """Return the graph's inputs, as ``forward`` takes them."""
        return ("encoder_attention_mask", "input_ids", "encoder_hidden_states")

    @property
    def output_names(self) -> tuple[str, ...]:
        """Return the graph's outputs, as ``forward`` returns them."""
        return ("logits", *_names("present", self.cache.blocks, "decoder", "encoder"))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what ``output_names`` lists."""
        mask, ids, hidden = inputs
        cache = _encoder_decoder_cache([], [])
        logits = _decoded(self.backbone, mask, ids, hidden, cache)
        layers = zip(
            cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True
        )
        parts = (part for pair in layers for part in _both(*pair))
        return (logits, *parts)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return a batch of 2 with padding."""
        width = self.layout.hidden_width(self.backbone)
        return _mask(), _ids()[:, :3], torch.randn(_BATCH, _LENGTH, width)

    def calls(self, batch: tuple[Tensor, ...]) -> Sequence[tuple[Tensor, ...]]:
        """Return one call with whole answers."""
        ids, mask, answers, _ = batch
        (hidden,) = EncoderGraph(self.backbone, self.cache, self.layout)(ids, mask)
        return [(mask, answers, hidden)]

    def runs(self, layer: str) -> bool:
        """Whether a layer is the embedding, the output layer or in a block of the decoder."""
        return self.layout.decodes(layer)


class DecoderWithPastGraph(EncoderDecoderGraph):
    """The next token of an answer; cross attention takes its keys and values from the past."""

    stem = "decoder_with_past_model"

    @property
    def input_names(self) -> tuple[str, ...]:
        """Return the graph's inputs, as ``forward`` takes them."""
        past = _names("past_key_values", self.cache.blocks, "decoder", "encoder")
        return ("encoder_attention_mask", "input_ids", *past)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Return logits, keys and values; those of cross attention do not change."""
        return ("logits", *_names("present", self.cache.blocks, "decoder"))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what ``output_names`` lists."""
        mask, ids, *past = inputs
        layers = [past[start : start + 4] for start in range(0, len(past), 4)]
        cache = _encoder_decoder_cache(
            [(layer[0], layer[1]) for layer in layers], [(layer[2], layer[3]) for layer in layers]
        )
        # Only its length is read.
        unread = past[2].new_zeros(()).expand(mask.shape[0], mask.shape[1], 1)
        logits = _decoded(self.backbone, mask, ids, unread, cache)
        parts = _both(*cache.self_attention_cache.layers)
        return (logits, *parts)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return a batch of 2 with padding."""
        shape = self.cache.tensor(_BATCH, _LENGTH)
        past = [torch.randn(shape) for _ in range(4 * self.cache.blocks)]
        # Different lengths keep the two axes apart.
        cut = [value[:, :, :3] if index % 4 < 2 else value for index, value in enumerate(past)]
        return (_mask(), _ids()[:, :2], *cut)

    def calls(self, batch: tuple[Tensor, ...]) -> Sequence[tuple[Tensor, ...]]:
        """Return one call with one more token after whole answers."""
        first = DecoderGraph(self.backbone, self.cache, self.layout)
        ((mask, answers, hidden),) = first.calls(batch)
        _, *past = first(mask, answers, hidden)
        return [(mask, answers[:, -1:], *past)]

    def runs(self, layer: str) -> bool:
        """As in ``decoder_model``, but keys and values of cross attention do not run."""
        return self.layout.decodes(layer) and not self.layout.projects_text(layer)


class CausalGraph(TextGenerationGraph):
    """Tokens behind a past, which may be empty, to what follows each of them."""

    stem = "model"

    @property
    def input_names(self) -> tuple[str, ...]:
        """Return the graph's inputs, as ``forward`` takes them."""
        past = _names("past_key_values", self.cache.blocks)
        return ("input_ids", "attention_mask", "position_ids", *past)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Return the graph's outputs, as ``forward`` returns them."""
        return ("logits", *_names("present", self.cache.blocks))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what ``output_names`` lists."""
        ids, mask, positions, *past = inputs
        pairs = [(past[start], past[start + 1]) for start in range(0, len(past), 2)]
        cache = filled_cache(pairs)
        logits = self.backbone(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return (logits, *(part for layer in cache.layers for part in _both(layer)))

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return a batch of 2 with padding."""
        past = [torch.randn(shape) for shape in self._past_shapes(_BATCH, 3)]
        ids = _ids()
        mask = torch.ones(_BATCH, 3 + ids.shape[1], dtype=torch.int64)
        positions = torch.arange(3, mask.shape[1]).expand(_BATCH, -1).contiguous()
        return (ids, mask, positions, *past)

    def calls(self, batch: tuple[Tensor, ...]) -> Sequence[tuple[Tensor, ...]]:
        """Return texts with their answers without a past, then one more token."""
        ids, mask, *_ = batch
        empty = [torch.zeros(shape) for shape in self._past_shapes(len(ids), 0)]
        begun = (ids, mask, (mask.cumsum(1) - 1).clamp(min=0), *empty)
        _, *past = self(*begun)
        longer = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return [begun, (ids[:, -1:], longer, mask.sum(1, keepdim=True), *past)]

    def _past_shapes(self, batch: int, length: int) -> list[tuple[int, ...]]:
        return [self.cache.tensor(batch, length)] * (2 * self.cache.blocks)

    def _axes(self, name: str) -> dict[int, str]:
        return (
            {0: "batch", 1: "total_sequence"} if name == "attention_mask" else super()._axes(name)
        )


def text_generation_graphs(
    family: TextGenerationFamily, backbone: nn.Module
) -> tuple[TextGenerationGraph, ...]:
    """Return the graphs of a model, in the order they run."""
    cache, layout = family.cache_shape(backbone), family.encoder_decoder
    if layout is None:
        return (CausalGraph(backbone, cache),)
    return (
        EncoderGraph(backbone, cache, layout),
        DecoderGraph(backbone, cache, layout),
        DecoderWithPastGraph(backbone, cache, layout),
    )


def comparison_inputs(graph: TextGenerationGraph, samples: ParityInputs) -> ParityInputs:
    """Return what a graph is compared on, from texts with their answers.

    Texts are cut, because what graphs return for each of their tokens is kept.
    """
    graph.eval()
    with torch.inference_mode():
        calls = [
            call
            for batch in samples.batches
            for call in graph.calls(tuple(value[:, :_LONGEST] for value in batch))
        ]
    return replace(samples, batches=calls)


def _names(what: str, count: int, *streams: str) -> tuple[str, ...]:
    """Return the names of keys and values, block by block."""
    kinds = [f"{stream}.{part}" for stream in streams for part in PARTS] or list(PARTS)
    return tuple(f"{what}.{block}.{kind}" for block in range(count) for kind in kinds)


def _decoded(backbone: nn.Module, mask: Tensor, ids: Tensor, hidden: Tensor, cache: Any) -> Tensor:
    logits: Tensor = backbone(
        encoder_outputs=(hidden,),
        attention_mask=mask,
        decoder_input_ids=ids,
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits


def _encoder_decoder_cache(
    self_layers: list[tuple[Tensor, Tensor]], cross_layers: list[tuple[Tensor, Tensor]]
) -> Any:
    from transformers import EncoderDecoderCache

    return EncoderDecoderCache(filled_cache(self_layers), filled_cache(cross_layers))


def _both(*layers: Any) -> tuple[Tensor, ...]:
    return tuple(part for layer in layers for part in (layer.keys, layer.values))


def _ids() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 8, (_BATCH, _LENGTH), generator=generator)


def _mask() -> Tensor:
    mask = torch.ones(_BATCH, _LENGTH, dtype=torch.int64)
    mask[-1, -2:] = 0
    return mask
