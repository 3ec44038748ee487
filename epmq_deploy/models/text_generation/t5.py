"""T5 (Raffel et al., arXiv 1910.10683), T5 1.1 and FLAN-T5 as ``transformers`` lays them out."""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from epmq_deploy.checkpoints.files import uses_settings
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.blocks import Block, Group
from epmq_deploy.models.loading import read_config
from epmq_deploy.models.text_generation.base import (
    OUTPUT,
    CacheShape,
    EncoderDecoderLayout,
    TextGenerationFamily,
    TextPair,
    stacked,
)
from epmq_deploy.models.text_generation.special_tokens import (
    SpecialTokens,
    end_tokens,
    generation_config,
    is_token,
    padding_token,
)
from epmq_deploy.models.text_inputs import example_texts
from epmq_deploy.models.tokens import TokenWeights

# Longest text where neither tokenizer nor model set a limit: what T5 was pre-trained with.
_LONGEST = 512
_NO_LIMIT = 10**6


class T5Family(TextGenerationFamily):
    """An encoder that reads the text, and a decoder that attends to the encoder's output.

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
        """Whether a block reads it; early releases hold a tensor that none reads."""
        return "EncDecAttention.relative_attention_bias" not in key

    def is_known(self, key: str) -> bool:
        """Whether it is a part of the model."""
        return key.startswith(("shared.", "encoder.", "decoder.", "lm_head."))

    def build(self, config: Any) -> Any:
        """Build T5 with a language-model head."""
        from transformers import T5ForConditionalGeneration

        return T5ForConditionalGeneration(config)

    def cache_shape(self, model: nn.Module) -> CacheShape:
        """Read the sizes of the decoder from the model's config."""
        config: Any = model.config
        return CacheShape(config.num_decoder_layers, config.num_heads, config.d_kv)

    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """Return encoder, then decoder; the first block of each passes its position bias on."""
        return tuple(
            _block(f"{stream}.block.{index}", stream, block)
            for stream in ("encoder", "decoder")
            for index, block in enumerate(model.get_submodule(f"{stream}.block").children())
        )

    def tokens(self, *inputs: Tensor, stream: str = "") -> TokenWeights:
        """Return that padding is not real; every other token of text and answer counts."""
        named = dict(zip(self.input_names, inputs, strict=True))
        mask = "attention_mask" if stream == "encoder" else "decoder_attention_mask"
        return TokenWeights(named[mask].bool())

    def embed(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Compute logits ``[n, V]`` of all tokens of the answers, each with its end."""
        named = dict(zip(self.input_names, inputs, strict=True))
        logits: Tensor = model(**named, use_cache=False).logits
        return logits[named["decoder_attention_mask"].bool()]

    def prediction_counts(self, *inputs: Tensor) -> Tensor:
        """Count the tokens of each answer, including its end."""
        return inputs[self.input_names.index("decoder_attention_mask")].sum(dim=1).cpu()

    def collate(self, folder: Path, samples: Sequence[TextPair]) -> tuple[Tensor, ...]:
        """Encode texts, and answers after the decoder's start token; each int64 ``[B, T]``.

        Raises:
            RecipeError: the tokenizer is missing or does not fit the model.
        """
        special = self.special_tokens(folder)
        assert special.start is not None, "an encoder-decoder has one"
        answers = self._encoded(folder, [sample.answer for sample in samples])
        # The decoder predicts the last token, the answer's end, and never reads it.
        shifted = [[special.start, *answer[:-1]] for answer in answers]
        texts = self.prompts(folder, [sample.text for sample in samples])
        return (*texts, *stacked(shifted, special.padding))

    def prompts(self, folder: Path, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode texts, right-padded."""
        return stacked(self._encoded(folder, texts), self.special_tokens(folder).padding)

    @uses_settings
    def _encoded(self, folder: Path, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts, each with its end."""
        tokenizer = self.tokenizer(folder)
        limit = int(tokenizer.model_max_length)
        limit = _LONGEST if limit > _NO_LIMIT else limit
        (end, *_) = self.special_tokens(folder).end
        rows = tokenizer(
            list(texts), add_special_tokens=False, truncation=True, max_length=limit - 1
        )["input_ids"]
        return [[*row, end] for row in rows]

    @uses_settings
    def special_tokens(self, folder: Path) -> SpecialTokens:
        """Read the ids from the config.

        Raises:
            RecipeError: the decoder has no start token.
        """
        config = read_config(folder)
        padding = padding_token(folder, config, 0)
        start = config.get("decoder_start_token_id", padding)
        if start is None:
            start = generation_config(folder).get("decoder_start_token_id")
        if not is_token(start, int(config["vocab_size"])):
            raise RecipeError(
                f"{folder}/config.json: decoder_start_token_id is {start}, which is no token of "
                "the vocabulary"
            )
        ends = end_tokens(folder, config, self.tokenizer(folder), default=1)
        return SpecialTokens(start, ends, padding)

    @uses_settings
    def example_inputs(self, folder: Path, batch: int) -> tuple[Tensor, ...]:
        """Return random ids; the last text and answer of a batch are padded."""
        config = read_config(folder)
        names = ("input_ids", "attention_mask")
        texts = example_texts(names, config, _LONGEST, batch)
        answers = example_texts(names, config, 4, batch)
        return (*texts, *answers)

    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """Leave open the number of texts and the lengths of texts and answers."""
        text, answer = {0: "batch", 1: "sequence"}, {0: "batch", 1: "decoder_sequence"}
        return (text, text, answer, answer)


def _block(name: str, stream: str, block: nn.Module) -> Block:
    parts = block.get_submodule("layer")
    last = len(list(parts.children())) - 1
    feed = parts.get_submodule(f"{last}.DenseReluDense")
    # The gated variant multiplies the outputs of two layers.
    inner = ("wi_0", "wi_1") if hasattr(feed, "wi_0") else ("wi",)
    self_attention, cross_attention = "layer.0.SelfAttention", "layer.1.EncDecAttention"
    groups = [
        Group(
            (f"{self_attention}.q", f"{self_attention}.k", f"{self_attention}.v"),
            norm="layer.0.layer_norm",
        ),
        Group((f"{self_attention}.o",)),
    ]
    if stream == "decoder":
        groups += [
            Group((f"{cross_attention}.q",), norm="layer.1.layer_norm"),
            Group((f"{cross_attention}.k", f"{cross_attention}.v"), stream="encoder"),
            Group((f"{cross_attention}.o",)),
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
