"""Decoder-only models in the layout of Llama (Touvron et al., arXiv 2302.13971)."""

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
    TextGenerationFamily,
    TextPair,
    stacked,
)
from epmq_deploy.models.text_generation.special_tokens import (
    SpecialTokens,
    end_tokens,
    padding_token,
)
from epmq_deploy.models.text_inputs import example_texts
from epmq_deploy.models.tokens import TokenWeights

_BLOCKS = "model.layers"
_GROUPS = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm="input_layernorm"),
    Group(("self_attn.o_proj",)),
    Group(("mlp.gate_proj", "mlp.up_proj"), norm="post_attention_layernorm"),
    Group(("mlp.down_proj",)),
)


class DecoderFamily(TextGenerationFamily):
    """Llama, Mistral, Qwen2 and Qwen3: the answer continues the text.

    Texts too long for the model lose their beginning, so that the answer follows their end.
    """

    name = "decoder"
    model_types = ("llama", "mistral", "qwen2", "qwen3")
    architecture = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "vocab_size",
    )
    input_names = ("input_ids", "attention_mask", "answer_mask")
    cuts = "left"
    tied = MappingProxyType({OUTPUT: "model.embed_tokens.weight"})

    def is_known(self, key: str) -> bool:
        """Whether it is a part of the model: names begin with what wrappers are called, too."""
        return key.startswith(("model.embed_tokens.", f"{_BLOCKS}.", "model.norm.", "lm_head."))

    def check_config(self, folder: Path, config: dict[str, Any]) -> None:
        """Refuse sliding-window attention: blocks would not share one mask."""
        windowed = config.get("use_sliding_window", config.get("model_type") == "mistral")
        if windowed and config.get("sliding_window") is not None:
            raise RecipeError(f"{folder}: attention in a sliding window is not supported")

    def build(self, config: Any) -> Any:
        """Build the causal language model."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config)

    def cache_shape(self, model: nn.Module) -> CacheShape:
        """Read the sizes of the decoder from the model's config."""
        config: Any = model.config
        # Configs of early models leave the width of a head to be computed.
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        return CacheShape(config.num_hidden_layers, config.num_key_value_heads, width)

    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """Return the decoder's blocks."""
        count = len(list(model.get_submodule(_BLOCKS).children()))
        names = (f"{_BLOCKS}.{index}" for index in range(count))
        return tuple(Block(name, tuple(group.inside(name) for group in _GROUPS)) for name in names)

    def tokens(self, *inputs: Tensor, stream: str = "") -> TokenWeights:
        """Return that padding is not real; every other token of text and answer counts."""
        return TokenWeights(inputs[1].bool())

    def embed(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Compute logits ``[n, V]`` of all tokens of the answers, each with its end."""
        ids, mask, due = inputs
        body = model.get_submodule("model")
        hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        # Logits of every token of a text would need too much memory.
        logits: Tensor = model.get_submodule("lm_head")(hidden[due.bool()])
        return logits

    def prediction_counts(self, *inputs: Tensor) -> Tensor:
        """Count the tokens of each answer, including its end."""
        return inputs[2].sum(dim=1).cpu()

    def collate(self, folder: Path, samples: Sequence[TextPair]) -> tuple[Tensor, ...]:
        """Encode texts with their answers and the end; mark tokens followed by an answer's token.

        Each int64 ``[B, T]``.

        Raises:
            RecipeError: the tokenizer is missing or does not fit the model.
        """
        special = self.special_tokens(folder)
        texts = self._encoded(folder, [sample.text for sample in samples])
        answers = [sample.answer for sample in samples]
        # Tokenized separately from the texts, as generated answers are.
        encoded = self.tokenizer(folder)(answers, add_special_tokens=False)["input_ids"]
        limit = self._limit(folder)
        rows, due = [], []
        for text, answer in zip(texts, encoded, strict=True):
            row = [*text, *answer, special.end[0]][-limit:]
            # The last token is the end, and nothing follows it.
            count = min(len(answer) + 1, len(row) - 1)
            rows.append(row)
            due.append([0] * (len(row) - count - 1) + [1] * count + [0])
        return *stacked(rows, special.padding), stacked(due, 0)[0]

    def prompts(self, folder: Path, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode texts, left-padded so that all end together."""
        rows = self._encoded(folder, texts)
        return stacked(rows, self.special_tokens(folder).padding, left=True)

    @uses_settings
    def _encoded(self, folder: Path, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts with the tokenizer's start token, but without their end."""
        ends = set(self.special_tokens(folder).end)
        rows = self.tokenizer(folder)(list(texts), truncation=True, max_length=self._limit(folder))[
            "input_ids"
        ]
        return [row[:-1] if row and row[-1] in ends else row for row in rows]

    @uses_settings
    def _limit(self, folder: Path) -> int:
        positions = int(read_config(folder)["max_position_embeddings"])
        return min(positions, int(self.tokenizer(folder).model_max_length))

    @uses_settings
    def special_tokens(self, folder: Path) -> SpecialTokens:
        """Read the ids; the end token pads where no padding token is defined."""
        config = read_config(folder)
        ends = end_tokens(folder, config, self.tokenizer(folder))
        return SpecialTokens(None, ends, padding_token(folder, config, ends[0]))

    @uses_settings
    def example_inputs(self, folder: Path, batch: int) -> tuple[Tensor, ...]:
        """Return random ids; the last text of a batch is padded, and every token is an answer's."""
        config = read_config(folder)
        names, longest = self.input_names[:2], config["max_position_embeddings"]
        ids, mask = example_texts(names, config, longest, batch)
        return ids, mask, mask

    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """Leave open the number of texts and their length."""
        return tuple({0: "batch", 1: "sequence"} for _ in self.input_names)


FAMILY = DecoderFamily()
