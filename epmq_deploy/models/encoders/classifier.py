"""What encoders with a classifier on top have in common, whatever they read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.files import uses_settings
from epmq_deploy.checkpoints.tensors import Rename
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.base import TypedFamily
from epmq_deploy.models.blocks import Block, Group
from epmq_deploy.models.head import Activation, TaskHead
from epmq_deploy.models.loading import fill, read_config


@dataclass(frozen=True)
class HeadLayout:
    """Where a fine-tuned checkpoint keeps its head.

    Attributes:
        classifier: name of the linear layer that gives the logits.
        pooler: name of the linear layer before it, where there is one.
        activation: between the two.
        norm: name of the LayerNorm right before the classifier, where there is one.
        norm_epsilon: what it adds to variances.
        without: parts of ``TaskHead`` that such heads do not have, biases.
    """

    classifier: str = "classifier"
    pooler: str | None = None
    activation: Activation = "tanh"
    norm: str | None = None
    norm_epsilon: float = 1e-5
    without: frozenset[str] = frozenset()

    @property
    def tensors(self) -> dict[str, str]:
        """Part of ``TaskHead`` to tensor name."""
        parts = {"weight": f"{self.classifier}.weight", "bias": f"{self.classifier}.bias"}
        if self.pooler is not None:
            parts["pooler_weight"] = f"{self.pooler}.weight"
            parts["pooler_bias"] = f"{self.pooler}.bias"
        if self.norm is not None:
            parts["norm_weight"] = f"{self.norm}.weight"
            parts["norm_bias"] = f"{self.norm}.bias"
        return {part: name for part, name in parts.items() if part not in self.without}


class ClassifierFamily(TypedFamily):
    """Encoders whose experts are classifiers: the encoder is merged, each head kept.

    Attributes:
        prefixes: what fine-tuned checkpoints put before the encoder's tensor names.
        renames: parts of stored names to those of the loaded model, applied in order.
        deployed: beginnings of the names of the encoder's tensors.
        heads: beginnings of the names of heads' tensors.
        head: where experts keep theirs.
        block_list: the module list that holds the blocks.
        groups: a block's groups, names within the block.
        block_norm: a norm within the block that runs after all groups.
        reads_one_token: whether heads see only the first token's hidden state.
        model_options: what the model's constructor takes besides its config.
    """

    experts_carry_heads = True
    prefixes: tuple[str, ...]
    renames: tuple[tuple[str, str], ...] = ()
    deployed: tuple[str, ...]
    heads: tuple[str, ...] = ("classifier.",)
    head = HeadLayout()
    block_list: str
    groups: tuple[Group, ...]
    block_norm: str | None = None
    reads_one_token: bool = True
    model_options: Mapping[str, Any] = MappingProxyType({"add_pooling_layer": False})

    def is_deployed(self, key: str) -> bool:
        """Whether it belongs to the encoder."""
        return key.startswith(self.deployed)

    def is_optional(self, key: str) -> bool:
        """Whether only pre-training uses it; otherwise every expert holds the whole encoder."""
        return key.endswith(".mask_token")

    def is_head(self, key: str) -> bool:
        """Whether it belongs to the classifier or the layers between it and the encoder."""
        return key.startswith(self.heads)

    def canonical_key(self, key: str) -> str | tuple[str, ...]:
        """Drop the prefix of fine-tuned checkpoints and apply ``renames``."""
        for prefix in self.prefixes:
            if key.startswith(prefix):
                key = key.removeprefix(prefix)
                break
        for old, new in self.renames:
            key = key.replace(old, new)
        return key

    @uses_settings
    def load(self, folder: Path) -> nn.Module:
        """Load the encoder, without the layers between it and the classifier.

        Raises:
            RecipeError: see ``check_config``.
        """
        self.check_config(folder, read_config(folder))
        return load_encoder(folder, self.canonical_key, **self.model_options)

    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """Return one block per item of ``block_list``."""
        count = len(model.get_submodule(self.block_list))  # type: ignore[arg-type]
        return tuple(
            self._block(f"{self.block_list}.{index}", last=index == count - 1)
            for index in range(count)
        )

    def _block(self, name: str, *, last: bool) -> Block:
        # Keys and values of the last block serve the pooled token too, and share their input with
        # its query; all that follows is per token.
        pooled = last and self.reads_one_token
        groups = (
            replace(group, pooled=pooled and position > 0)
            for position, group in enumerate(self.groups)
        )
        norm = None if self.block_norm is None else f"{name}.{self.block_norm}"
        return Block(name, tuple(group.inside(name) for group in groups), norm=norm)

    def embed(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Return the pooled hidden states."""
        return self.pool(self.token_states(model, *inputs), *inputs)

    def token_states(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Return the last hidden states."""
        named = dict(zip(self.input_names, inputs, strict=True))
        states: Tensor = model(**named).last_hidden_state
        return states

    def pool(self, states: Tensor, *inputs: Tensor) -> Tensor:
        """Return the state of the first token."""
        return states[:, 0]

    def expert_head(self, expert: Checkpoint) -> TaskHead | None:
        """Read the expert's classifier, with the layers between it and the encoder.

        Raises:
            RecipeError: one of its tensors is missing.
        """
        kind = "Image" if self.modality == "image" else "Sequence"
        return self.read_head(expert, self.head, f"AutoModelFor{kind}Classification")

    def read_head(self, expert: Checkpoint, layout: HeadLayout, builder: str) -> TaskHead | None:
        """Read a head from an expert's checkpoint; None where it holds none.

        Args:
            expert: opened with ``canonical_key``.
            layout: of the head.
            builder: class of ``transformers`` that saves such experts.

        Raises:
            RecipeError: one of its tensors is missing.
        """
        names = layout.tensors
        stored = {part: name for part, name in names.items() if name in expert.tensors}
        if not any(part in stored for part in ("weight", "bias")):
            return None
        missing = [name for part, name in names.items() if part not in stored]
        if missing:
            raise RecipeError(
                f"{expert.folder}: its head lacks {', '.join(missing)}; save the expert with "
                f"{builder}"
            )
        tensors = {part: expert.load(name) for part, name in stored.items()}
        return TaskHead.of_tensors(tensors, layout.activation, norm_epsilon=layout.norm_epsilon)


def load_encoder(
    folder: Path,
    rename: Rename,
    *,
    without: Sequence[str] = (),
    prepare: Callable[[nn.Module], None] = lambda model: None,
    settings: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> nn.Module:
    """Load a folder's model without a head, as ``transformers`` builds it from ``config.json``.

    Args:
        folder: a model folder.
        rename: stored name to parameter name.
        without: modules, where the model has them, that it also runs without.
        prepare: changes the model in place before its weights are loaded.
        settings: take the place of those in ``config.json``.
        options: what the model's constructor takes besides its config.
    """
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    padding, is_token = getattr(config, "pad_token_id", None), padding_is_token(config)
    if not is_token:
        # Embeddings take it only as the row that is not trained.
        config.pad_token_id = None
    for name, value in settings.items():
        setattr(config, name, value)
    model: nn.Module = AutoModel.from_config(
        config, dtype=torch.float32, trust_remote_code=False, **options
    )
    if not is_token and _counts_from_padding(model):
        raise RecipeError(
            f"{folder}/config.json: pad_token_id is {padding}, which is no token of the "
            "vocabulary; positions are counted from it, so set it to the tokenizer's padding token"
        )
    for name in without:
        if hasattr(model, name):
            setattr(model, name, None)
    prepare(model)
    return fill(model, folder, rename)


def _counts_from_padding(model: nn.Module) -> bool:
    """Tell whether a model numbers positions from its padding token on, as RoBERTa does."""
    return any(
        "padding_idx" in vars(module) and "position_embeddings" in dict(module.named_children())
        for module in model.modules()
    )


def padding_is_token(config: Any) -> bool:
    """Tell whether the padding that a config of ``transformers`` names, if any, is a token."""
    padding = getattr(config, "pad_token_id", None)
    return padding is None or padding in range(getattr(config, "vocab_size", 0))
