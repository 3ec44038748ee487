"""How the network of a model family is loaded, run and taken apart."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from epmq_deploy.models.blocks import Block
from epmq_deploy.models.tokens import TokenWeights


class Network(ABC):
    """The part of the model that is merged, quantized and deployed.

    Parameter names of the loaded module equal the tensor names of the checkpoint, so that one name
    means the same thing in merging, quantization and export.

    Attributes:
        float32_blocks: whether blocks run in float32 alone, with products as well.
    """

    float32_blocks: bool = False

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """Load the network, float32, in eval mode."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """Return the blocks in the order they run, with the linear layers to quantize."""

    @abstractmethod
    def embed(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Compute what heads take from ``inputs`` as ``input_names``; see ``TaskHead``.

        Text generation has no heads: logits ``[n, V]`` of all tokens of the batch's answers.
        """

    def tokens(self, *inputs: Tensor, stream: str = "") -> TokenWeights:
        """Return which tokens of a batch of model inputs are real, and which one the heads read.

        Args:
            inputs: as ``input_names``.
            stream: of a block or group.
        """
        return TokenWeights()

    def token_states(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Compute the last hidden state of every token, ``[batch, T, D]``."""
        raise NotImplementedError("only where heads may read all tokens")

    def pool(self, states: Tensor, *inputs: Tensor) -> Tensor:
        """Return what ``embed`` computes from ``token_states`` and the same inputs."""
        raise NotImplementedError("only where heads may read all tokens")

    def prediction_counts(self, *inputs: Tensor) -> Tensor:
        """Return how many rows of ``embed`` each sample has, int64 ``[batch]``, on the CPU."""
        return torch.ones(len(inputs[0]), dtype=torch.int64)
