"""Encoders of ``transformers`` that have no family of their own, taken apart by running them."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.files import uses_settings
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.blocks import EVERY_TOKEN, Block
from epmq_deploy.models.encoders.classifier import ClassifierFamily, load_encoder
from epmq_deploy.models.encoders.image_classifier import ImageClassifierFamily
from epmq_deploy.models.encoders.text_classifier import WORD_CLASSIFIER, TextClassifierFamily
from epmq_deploy.models.generic.anatomy import anatomy_of, refusal
from epmq_deploy.models.generic.head_settings import adopted_settings
from epmq_deploy.models.generic.pooling import POOLINGS, as_tokens, last_token, real_tokens
from epmq_deploy.models.generic.preparation import prepare, runs_in_bfloat16
from epmq_deploy.models.generic.tracing import find_blocks
from epmq_deploy.models.generic.word_head import word_head_layout
from epmq_deploy.models.head import TaskHead
from epmq_deploy.models.loading import config_differences, read_config
from epmq_deploy.models.text_inputs import example_texts
from epmq_deploy.models.tokens import TokenWeights

log = logging.getLogger(__name__)


class GenericFamily(ClassifierFamily):
    """One model type that no other family recognises; experts are its classifiers.

    The encoder is merged and deployed; one or two linear layers on the first token or the mean of
    all tokens are the experts' heads. What is found in the model is said in a warning.

    Args:
        folder: of the base, or of what was made from it.
        adopted: settings of the config that are the experts'; see ``adopted_settings``.

    Raises:
        RecipeError: the model cannot be taken apart; says why.
    """

    architecture = (
        "hidden_size",
        "embedding_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
        "max_position_embeddings",
        "position_embedding_type",
        "type_vocab_size",
        "vocab_size",
        "image_size",
        "patch_size",
        "num_channels",
        # Decoders.
        "n_embd",
        "n_layer",
        "n_head",
        "n_inner",
        "activation_function",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "layer_norm_epsilon",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        # ALBERT.
        "num_hidden_groups",
        "inner_group_num",
        # DeBERTa.
        "relative_attention",
        "max_relative_positions",
        "position_buckets",
        "pos_att_type",
        "share_att_key",
        "norm_rel_ebd",
        "position_biased_input",
        "conv_kernel_size",
        # ModernBERT.
        "global_attn_every_n_layers",
        "local_attention",
        # Swin and ConvNeXt.
        "embed_dim",
        "depths",
        "num_heads",
        "window_size",
        "hidden_sizes",
    )

    def __init__(self, folder: Path, adopted: Mapping[str, Any] = MappingProxyType({})) -> None:
        config = read_config(folder) | dict(adopted)
        self._adopted = dict(adopted)
        self.name = str(config.get("model_type"))
        self.model_types = (self.name,)
        self._folder = folder
        self._anatomy = anatomy_of(config, folder)
        self._warned = False
        self.head = self._anatomy.head
        self.heads = tuple(
            f"{name}."
            for name in (self.head.classifier, self.head.pooler, self.head.norm)
            if name is not None
        )
        self.input_names = self._anatomy.input_names
        self.reads_one_token = self._anatomy.pooling in ("first", "last")

    def config_problems(self, base: dict[str, Any], expert: dict[str, Any]) -> list[str]:
        """Compare model types, then the keys of ``architecture``."""
        other_type = config_differences(("model_type",), base, expert)
        return other_type or super().config_problems(base, expert)

    def is_deployed(self, key: str) -> bool:
        """Whether it is a parameter of the encoder."""
        return key in self._anatomy.encoder and not self.is_head(key)

    def canonical_key(self, key: str) -> str | tuple[str, ...]:
        """Rename as ``transformers`` itself does."""
        return self._anatomy.rename(key)

    def merged_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Add what is the experts', and of a decoder say that it lacks what writes texts."""
        merged = {**config, **self._adopted}
        if self._anatomy.pooling == "last":
            merged["architectures"] = [self._anatomy.encoder_class]
        return merged

    @uses_settings
    def load(self, folder: Path) -> nn.Module:
        """Load the encoder without what belongs to the head."""
        return load_encoder(
            folder,
            self.canonical_key,
            without=self._anatomy.without,
            prepare=prepare,
            settings=self._adopted,
        )

    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """Find the blocks by running the model on example inputs.

        Raises:
            RecipeError: the model cannot be taken apart; says why.
        """
        device = next(model.parameters()).device
        inputs = [value.to(device) for value in self.example_inputs(self._folder, 2)]
        read = self.tokens(*inputs).pooled

        def run() -> Tensor:
            return self.embed(model, *inputs)

        try:
            blocks = find_blocks(model, run, read=read)
        except RecipeError as error:
            raise refusal(self._folder, self.name, error) from error
        except RuntimeError as error:
            reason = f"it does not run on inputs of its preprocessor ({error})"
            raise refusal(self._folder, self.name, reason) from error
        if not self._warned:
            groups = [group for block in blocks for group in block.groups]
            log.warning(
                "model type %r has no family of its own: found %d blocks with %d groups of linear "
                "layers, %d of them after a norm; compare the result with the experts",
                self.name,
                len(blocks),
                len(groups),
                sum(group.norm is not None for group in groups),
            )
            self._warned = True
            if not runs_in_bfloat16(run, device):
                log.warning(
                    "model type %r does not run in bfloat16: its blocks run in float32", self.name
                )
                self.float32_blocks = True
        return blocks

    def pool(self, states: Tensor, *inputs: Tensor) -> Tensor:
        """Pool hidden states as the model type's classifiers do."""
        named = dict(zip(self.input_names, inputs, strict=True))
        hidden = as_tokens(states)
        pooling, mask = self._anatomy.pooling, named.get("attention_mask")
        if mask is None:
            return POOLINGS[pooling](hidden, hidden.new_ones(hidden.shape[:2]))
        if pooling == "last":
            mask = real_tokens(named["input_ids"], mask, self._anatomy.padding)
        return POOLINGS[pooling](hidden, mask.to(hidden.dtype))


class GenericTextFamily(GenericFamily, TextClassifierFamily):
    """A model type that reads texts, with a tokenizer in ``tokenizer.json``."""

    modality = "text"
    tokenizer_files = ("tokenizer.json",)

    def positions(self, config: dict[str, Any]) -> int:
        """Return the size of the table of positions."""
        return self._anatomy.positions

    def vocabulary(self, config: dict[str, Any]) -> int:
        """Return the size of the table of tokens."""
        return self._anatomy.vocabulary

    @property
    def pads_with_end(self) -> bool:  # type: ignore[override]
        """Whether the token read is the last one that is no padding, wherever that is."""
        return self._anatomy.pooling == "last"

    def example_inputs(self, folder: Path, batch: int) -> tuple[Tensor, ...]:
        """Return random ids; the last sequence of a batch is padded, as in real batches."""
        anatomy = self._anatomy
        sizes = {"vocab_size": anatomy.vocabulary, "pad_token_id": anatomy.padding}
        return example_texts(self.input_names, sizes, anatomy.positions, batch)

    def tokens(self, *inputs: Tensor, stream: str = "") -> TokenWeights:
        """Return that padding is not real, and which token is read where heads read one."""
        if stream == EVERY_TOKEN:
            return TokenWeights()
        ids, mask = inputs[:2]
        tokens = super().tokens(*inputs, stream=stream)
        if self._anatomy.pooling != "last":
            return tokens
        return TokenWeights(tokens.real, last_token(real_tokens(ids, mask, self._anatomy.padding)))

    def expert_word_head(self, expert: Checkpoint) -> TaskHead | None:
        """Read the expert's classifier of words.

        Raises:
            RecipeError: one of its tensors is missing, or it has other layers than a linear one
                and those of the model type's classifiers of texts.
        """
        layouts = (self.word_head, self.head)
        layout = word_head_layout(read_config(self._folder), layouts, expert.folder)
        return self.read_head(expert, layout, WORD_CLASSIFIER)


class GenericImageFamily(GenericFamily, ImageClassifierFamily):
    """A model type that reads images."""

    modality = "image"


def generic_family(folder: Path, experts: Iterable[ModelFolder] = ()) -> GenericFamily:
    """Return the family of a folder whose model type no other family recognises.

    Args:
        folder: of the base, or of what was made from it.
        experts: folders of the base's experts.

    Raises:
        RecipeError: the model cannot be taken apart; says why.
    """
    config = read_config(folder)
    adopted = adopted_settings(folder, config, experts)
    anatomy = anatomy_of(config | adopted, folder)
    kinds: dict[str, type[GenericFamily]] = {"text": GenericTextFamily, "image": GenericImageFamily}
    return kinds[anatomy.modality](folder, adopted)
