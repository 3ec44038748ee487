"""T5 (Raffel et al., arXiv 1910.10683), T5 1.1 and FLAN-T5 as ``transformers`` lays them out."""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from epmq_deploy.errors import RecipeError
from epmq_deploy.models.blocks import Block, Group
from epmq_deploy.models.loading import read_config
from epmq_deploy.models.text_generation.base import (
    OUTPUT,
    CacheShape,
    EncoderDecoderLayout,
    SpecialTokens,
    TextGenerationFamily,
    TextPair,
    end_tokens,
    stacked,
)
from epmq_deploy.models.text_inputs import example_texts
from epmq_deploy.models.tokens import TokenWeights

# Longest text where neither tokenizer nor model set a limit: what T5 was pre-trained with.
_LONGEST = 512
_NO_LIMIT = 10**6


class T5Family(TextGenerationFamily):
    """Text in, text out: an encoder, and a decoder that reads what the encoder made of the text.

    Texts are cut at the tokenizer's ``model_max_length``.
    """

    name = "t5"
    model_types = ("t5",)
    architecture = (
        "d_model",
        "d_kv",
        "d_ff",
        "num_layers",
        "num_decoder_layers",
        "num_heads",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "feed_forward_proj",
        "layer_norm_epsilon",
        "tie_word_embeddings",
        "vocab_size",
    )
    tokenizer_files = ("spiece.model",)
    encoder_decoder = EncoderDecoderLayout(
        embedding="shared",
        encoder="encoder",
        decoder="decoder",
        output="lm_head",
        cross_attention=(".EncDecAttention.k", ".EncDecAttention.v"),
    )
    input_names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    tied = MappingProxyType(
        dict.fromkeys(
            ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", OUTPUT), "shared.weight"
        )
    )

    def is_deployed(self, key: str) -> bool:
        """All but a tensor of early releases that no block reads."""
        return "EncDecAttention.relative_attention_bias" not in key

    def build(self, config: Any) -> Any:
        """See base."""
        from transformers import T5ForConditionalGeneration

        return T5ForConditionalGeneration(config)

    def cache_shape(self, model: nn.Module) -> CacheShape:
        """Read the sizes of the decoder from the model's config."""
        config: Any = model.config
        return CacheShape(config.num_decoder_layers, config.num_heads, config.d_kv)

    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """Encoder, then decoder; the first block of each passes its position bias on."""
        return tuple(
            _block(f"{stream}.block.{index}", stream, block)
            for stream in ("encoder", "decoder")
            for index, block in enumerate(model.get_submodule(f"{stream}.block").children())
        )

    def tokens(self, *inputs: Tensor, stream: str = "") -> TokenWeights:
        """Padding is not real; every other token of text and answer counts."""
        named = dict(zip(self.input_names, inputs, strict=True))
        mask = "attention_mask" if stream == "encoder" else "decoder_attention_mask"
        return TokenWeights(named[mask].bool())

    def embed(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Logits ``[n, V]`` for each token of the answers and its end."""
        named = dict(zip(self.input_names, inputs, strict=True))
        logits: Tensor = model(**named, use_cache=False).logits
        return logits[named["decoder_attention_mask"].bool()]

    def prediction_counts(self, *inputs: Tensor) -> Tensor:
        """The tokens of each answer, and its end."""
        return inputs[self.input_names.index("decoder_attention_mask")].sum(dim=1).cpu()

    def collate(self, folder: Path, samples: Sequence[TextPair]) -> tuple[Tensor, ...]:
        """Texts, and answers behind the decoder's start token; each int64 ``[B, T]``.

        Raises:
            RecipeError: the tokenizer is missing or does not fit the model.
        """
        special = self.special_tokens(folder)
        assert special.start is not None, "an encoder-decoder has one"
        answers = self._encoded(folder, [sample.answer for sample in samples])
        # The decoder predicts the last token, the answer's end, and never reads it.
        behind = [[special.start, *answer[:-1]] for answer in answers]
        texts = self.prompts(folder, [sample.text for sample in samples])
        return (*texts, *stacked(behind, special.padding))

    def prompts(self, folder: Path, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See base."""
        return stacked(self._encoded(folder, texts), self.special_tokens(folder).padding)

    def _encoded(self, folder: Path, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, each with its end."""
        tokenizer = self.tokenizer(folder)
        limit = int(tokenizer.model_max_length)
        limit = _LONGEST if limit > _NO_LIMIT else limit
        (end, *_) = self.special_tokens(folder).end
        rows = tokenizer(
            list(texts), add_special_tokens=False, truncation=True, max_length=limit - 1
        )["input_ids"]
        return [[*row, end] for row in rows]

    def special_tokens(self, folder: Path) -> SpecialTokens:
        """See base."""
        config = read_config(folder)
        padding = int(config.get("pad_token_id") or 0)
        start = config.get("decoder_start_token_id", padding)
        if start is None:
            raise RecipeError(f"{folder}/config.json: decoder_start_token_id is not set")
        return SpecialTokens(int(start), end_tokens({"eos_token_id": 1} | config, folder), padding)

    def example_inputs(self, folder: Path, batch: int) -> tuple[Tensor, ...]:
        """Random ids; the last text and answer of a batch are padded."""
        config = read_config(folder)
        names = ("input_ids", "attention_mask")
        texts = example_texts(names, config, _LONGEST, batch)
        answers = example_texts(names, config, 4, batch)
        return (*texts, *answers)

    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """Any number of texts and answers of any length."""
        text, answer = {0: "batch", 1: "sequence"}, {0: "batch", 1: "decoder_sequence"}
        return (text, text, answer, answer)


def _block(name: str, stream: str, block: nn.Module) -> Block:
    parts = block.get_submodule("layer")
    last = len(list(parts.children())) - 1
    feed = parts.get_submodule(f"{last}.DenseReluDense")
    # The gated variant multiplies what two layers give.
    inner = ("wi_0", "wi_1") if hasattr(feed, "wi_0") else ("wi",)
    own, across = "layer.0.SelfAttention", "layer.1.EncDecAttention"
    groups = [
        Group((f"{own}.q", f"{own}.k", f"{own}.v"), norm="layer.0.layer_norm"),
        Group((f"{own}.o",)),
    ]
    if stream == "decoder":
        groups += [
            Group((f"{across}.q",), norm="layer.1.layer_norm"),
            Group((f"{across}.k", f"{across}.v"), stream="encoder"),
            Group((f"{across}.o",)),
        ]
    dense = f"layer.{last}.DenseReluDense"
    groups += [
        Group(tuple(f"{dense}.{layer}" for layer in inner), norm=f"layer.{last}.layer_norm"),
        Group((f"{dense}.wo",)),
    ]
    return Block(
        name, tuple(group.inside(name) for group in groups), stream=stream, passes_on=((1, 1),)
    )


FAMILY = T5Family()
